"""Stopping a Lightning Trainer when a logged value has stopped changing."""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch import Tensor

from matent_callbacks.callbacks.guard import Guard, GuardedHooks
from matent_callbacks.callbacks.stopping import logged_values, say_stop, warn_never_logged
from matent_callbacks.lightning._trainer import Callback, publish
from matent_callbacks.plateau import PlateauDetector


class PlateauStopping(GuardedHooks, Callback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each time the value is logged is one observation, whatever logs it: the training loss, a validation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does. A value is seen one batch late if it is
    logged by a callback further back in the list, or by the module's ``on_train_epoch_end``.

    ====================================  ===========================================================================
    ``plateau/<monitor>``                 trend: estimated change of the value per ``patience`` observations
    ``plateau/<monitor>/since_progress``  observations since the trend was last above ``min_delta``
    ====================================  ===========================================================================

    Args:
        monitor: The logged name, such as ``val_effective_rank/last`` or ``train_loss``.
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
        >>> from matent_callbacks.lightning import PlateauStopping
        >>> stopping = PlateauStopping("val_effective_rank/last", min_delta=0.5, patience=5, mode="any")
    """

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
        self._settings = {"monitor": monitor, "min_delta": min_delta, "patience": patience, "mode": mode}
        self.start_over()

    def start_over(self) -> None:
        self.detector = self._new_detector()
        self._last: Tensor | None = None

    @property
    def state_key(self) -> str:
        return str(self._generate_state_key(**self._settings))

    def state_dict(self) -> dict[str, Any]:
        return self.detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.detector.load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._observe(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._observe(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._last is None:
            warn_never_logged(self.monitor, trainer.callback_metrics)

    def _observe(self, trainer: Any) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or self._is_old(value):
            return
        self._last = value
        stop = False
        with self.guard("the observation of a value"):
            stop = self.detector.update(trainer.global_step, float(value))
        # Ranks that log different values, or fail to observe one, must not stop at different steps.
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        stops_now = stop and not trainer.should_stop
        trainer.should_stop |= stop
        publish(trainer, logged_values(self.monitor, self.detector), self.guard)
        if stops_now and self.verbose and trainer.is_global_zero:
            say_stop(self.monitor, self.detector)

    def _is_old(self, value: Tensor) -> bool:
        """Whether this was observed before: ``callback_metrics`` keeps a value until it is logged again.

        The tensor that was observed is held, so one that was logged since lies elsewhere in memory.
        """
        return self._last is not None and value.data_ptr() == self._last.data_ptr()
