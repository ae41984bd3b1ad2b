"""The base class of both frameworks' ``PlateauStopping``: arguments, state, logged values and messages."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import Guard, GuardedHooks
from matent_callbacks.callbacks.unlogged import warn_never_logged
from matent_callbacks.plateau import PlateauDetector


@with_arguments_of(PlateauDetector)
class SharedPlateauStopping(GuardedHooks):
    """Arguments of ``PlateauStopping`` and its detector; the adapters observe what is logged, and stop.

    Args:
        monitor: The logged name, such as ``effective_rank/last`` or that of a loss.
        verbose: Print one line at the stop: why, at which step and at which value.
        on_error: ``"warn"``: an error in a run is warned about once, and training goes on; ``"raise"``.
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
        self.verbose = verbose
        self.smoothing = smoothing
        self.settings: dict[str, Any] = {"min_delta": min_delta, "patience": patience, "mode": mode}
        """These identify the detector in a checkpoint."""
        self._new_detector = functools.partial(
            PlateauDetector, **self.settings, warmup_steps=warmup_steps, smoothing=smoothing
        )
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self.detector = self._new_detector()
        self.observed = False

    def logged_values(self) -> dict[str, float]:
        """Return the trend, once there are two observations, and the number of observations since progress."""
        trend = {} if self.detector.trend is None else {f"plateau/{self.monitor}": self.detector.trend}
        return {**trend, f"plateau/{self.monitor}/since_progress": float(self.detector.since_progress)}

    def say_stop(self) -> None:
        """Print one line on why, at which step and at which value."""
        print(f"Stopping: {self.monitor}: {self.detector.reason}")

    def warn_if_never_logged(self, logged: Iterable[str]) -> None:
        """Warn if the name was never logged, with the names that were."""
        if not self.observed:
            warn_never_logged(self.monitor, logged, "training could not stop on it")
