"""Raises an alarm in a Hugging Face Trainer when a logged value collapses."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.collapse_alarm import SharedCollapseAlarm
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.transformers._observing import ObservingCallback
from matent_callbacks.transformers._reporters import alert


@with_arguments_of(SharedCollapseAlarm)
class CollapseAlarm(SharedCollapseAlarm, ObservingCallback):
    """Raises an alarm when a logged value has fallen far below its level and does not come back.

    Each log record with the value is one observation, whatever logs it. The decision is
    :class:`~matent_callbacks.CollapseDetector`'s, which is not deceived by the dip of a healthy run in its first steps.
    An alarm is one line, in a warning and among the alerts of W&B, and is not raised again until the value has
    recovered. The observations are in every checkpoint, so a resumed run raises the alarms of an uninterrupted one.

    ====================  ===========================================================================================
    ``collapse/<key>``    1 in the record in which the alarm is raised, 0 in that of a recovery
    ====================  ===========================================================================================

    Example:
        >>> from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback
        >>> callbacks = [MatrixEntropyCallback(every_n_steps=10, layers="all"), CollapseAlarm(action="stop")]
        >>> # Trainer(..., callbacks=callbacks).train()
    """

    @guarded
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        watched = self.watched(logs or {})
        if logs is None or not watched:
            return
        alarms, recovered = self.observe(state.global_step, {key: float(logs[key]) for key in watched})
        values = self.note(alarms, recovered)
        # Before anything that could fail: all ranks stop at this step or none.
        if alarms:
            control.should_training_stop |= self.action == "stop"
            control.should_save |= self.checkpoint
        self.keep_state(state)
        logs.update(values)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(values)
        if state.is_world_process_zero:
            self.tell(alarms, lambda title, text: alert(self.trainer, self.guard, title, text))
        self.act(alarms)
