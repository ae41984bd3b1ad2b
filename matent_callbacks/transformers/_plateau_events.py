"""Stops a Hugging Face Trainer when a logged value has stopped changing."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.plateau_stopping import SharedPlateauStopping
from matent_callbacks.transformers._attach import AttachedCallback


@with_arguments_of(SharedPlateauStopping)
class PlateauStopping(SharedPlateauStopping, AttachedCallback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each log record with the value is one observation, whatever logs it: the training loss, an evaluation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does.

    ====================================  ===========================================================================
    ``plateau/<monitor>``                 trend: estimated change of the value per ``patience`` observations
    ``plateau/<monitor>/since_progress``  observations since the trend was last above ``min_delta``
    ====================================  ===========================================================================

    Example:
        >>> from matent_callbacks.transformers import PlateauStopping
        >>> stopping = PlateauStopping("eval_effective_rank/last", min_delta=0.5, patience=5, mode="any")
    """

    order = 1

    @property
    def state_key(self) -> str:
        """Identifies this callback's state in the checkpoint."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{type(self).__name__}({self.monitor}, {settings})"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and, with :attr:`state_key`, what a report of the run needs, as JSON types."""
        return {**self.detector.state_dict(), "smoothing": self.smoothing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.detector.load_state_dict(state)

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
        self.observed = True
        stop = self.detector.update(state.global_step, float(logs[self.monitor]))
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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.warn_if_never_logged({key for record in state.log_history for key in record})
