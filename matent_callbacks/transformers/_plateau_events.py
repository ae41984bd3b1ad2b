"""Stopping a Hugging Face Trainer when a logged value has stopped changing."""

from __future__ import annotations

import functools
from typing import Any, Literal

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.stopping import logged_values, say_stop, warn_never_logged
from matent_callbacks.plateau import PlateauDetector
from matent_callbacks.transformers._attach import AttachedCallback


class PlateauStopping(AttachedCallback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each log record with the value is one observation, whatever logs it: the training loss, an evaluation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does.

    ====================================  ===========================================================================
    ``plateau/<monitor>``                 trend: estimated change of the value per ``patience`` observations
    ``plateau/<monitor>/since_progress``  observations since the trend was last above ``min_delta``
    ====================================  ===========================================================================

    Args:
        monitor: The logged name, such as ``eval_effective_rank/last`` or ``loss``.
        min_delta: Change per ``patience`` observations that counts as progress; above 0.
        patience: Number of observations in which ``min_delta`` has to be gained.
        mode: ``"max"`` stops when the value no longer rises, ``"min"`` when it no longer falls, ``"any"`` when it does
            neither.
        warmup_steps: Values at steps below this are not observed.
        smoothing: Standard deviation of the noise to expect, in units of ``min_delta``.
        verbose: Print one line at the stop: why, at which step and at which value.
        on_error: ``"warn"``: what goes wrong in a run is said once and training goes on; ``"raise"``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from matent_callbacks.transformers import PlateauStopping
        >>> stopping = PlateauStopping("eval_effective_rank/last", min_delta=0.5, patience=5, mode="any")
    """

    order = 1

    def __init__(
        self,
        monitor: str,
        *,
        min_delta: float,
        patience: int,
        mode: Literal["max", "min", "any"] = "max",
        warmup_steps: int = 0,
        smoothing: float = 0.45,
        verbose: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.guard = Guard(type(self).__name__, on_error)
        self.monitor = monitor
        self._new_detector = functools.partial(
            PlateauDetector,
            min_delta=min_delta,
            patience=patience,
            mode=mode,
            warmup_steps=warmup_steps,
            smoothing=smoothing,
        )
        self.verbose = verbose
        self._settings = f"{monitor}, min_delta={min_delta}, patience={patience}, mode={mode}"
        self._smoothing = smoothing
        self.start_over()

    def start_over(self) -> None:
        self.detector = self._new_detector()
        self._observed = False

    @property
    def state_key(self) -> str:
        """Tells this callback's state from that of others in the checkpoint."""
        return f"{type(self).__name__}({self._settings})"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, and with the name of the state, what a reader needs to judge it; as JSON types."""
        return {**self.detector.state_dict(), "smoothing": self._smoothing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
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
        self._observed = True
        stop = self.detector.update(state.global_step, float(logs[self.monitor]))
        stops_now = stop and not control.should_training_stop
        # Before anything that could fail: all ranks stop at this step or none.
        control.should_training_stop |= stop
        self.keep_state(state)
        values = logged_values(self.monitor, self.detector)
        logs.update(values)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(values)
        if stops_now and self.verbose and state.is_world_process_zero:
            say_stop(self.monitor, self.detector)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._observed:
            warn_never_logged(self.monitor, {key for record in state.log_history for key in record})
