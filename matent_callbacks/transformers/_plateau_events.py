"""Stops a Hugging Face Trainer when a logged value has stopped changing."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.plateau_stopping import SharedPlateauStopping
from matent_callbacks.transformers._observing import ObservingCallback


@with_arguments_of(SharedPlateauStopping)
class PlateauStopping(SharedPlateauStopping, ObservingCallback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each log record with the value is one observation, whatever logs it: the training loss, an evaluation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does; if its settings have changed, the new
    ones judge the values of before, too.

    ====================================  ===========================================================================
    ``plateau/<monitor>``                 trend: estimated change of the value per ``patience`` observations
    ``plateau/<monitor>/since_progress``  observations since the trend was last above ``min_delta``
    ====================================  ===========================================================================

    Example:
        >>> from matent_callbacks.transformers import PlateauStopping
        >>> stopping = PlateauStopping("eval_effective_rank/last", min_delta=0.5, patience=5, mode="any")
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
        if logs is None or self.monitor not in logs:
            return
        stop = self.observe(state.global_step, float(logs[self.monitor]))
        stops_now = stop and not control.should_training_stop
        # Before anything that could fail: all ranks stop at this step or none.
        control.should_training_stop |= stop
        self.keep_state(state)
        values = self.logged_values()
        logs.update(values)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(values)
        if stops_now and self.verbose and state.is_world_process_zero:
            self.say_stop()
