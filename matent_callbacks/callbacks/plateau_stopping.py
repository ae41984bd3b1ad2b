"""The base class of both frameworks' ``PlateauStopping``: arguments, state, logged values and messages."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.needed_arguments import needs_arguments
from matent_callbacks.callbacks.unlogged import Unlogged
from matent_callbacks.plateau import PlateauDetector

# Observations in a checkpoint, for a resumed run with a longer window.
_KEPT = 500


@with_arguments_of(PlateauDetector)
class SharedPlateauStopping:
    """Arguments of ``PlateauStopping`` and its detector; the adapters observe what is logged, and stop.

    Args:
        monitor: The logged name, such as ``effective_rank/last`` or that of a loss.
        verbose: Print one line at the stop: why, at which step and at which value.
        on_error: ``"warn"``: an error in a run is warned about once, and training goes on; ``"raise"``.
    """

    @needs_arguments('"eval_loss", mode="min", min_delta=0.01, patience=5')
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
        self.settings: dict[str, Any] = {
            "min_delta": min_delta,
            "patience": patience,
            "mode": mode,
            "warmup_steps": warmup_steps,
            "smoothing": smoothing,
        }
        """The arguments of the detector, which are in the checkpoint, too."""
        self.start_over()

    def start_over(self) -> None:
        super().start_over()  # type: ignore[misc]  # that of the adapter
        self.detector = PlateauDetector(**self.settings)
        self.unlogged = Unlogged(self.monitor, "training could not stop on it")
        self._history: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def observe(self, step: int, value: float) -> bool:
        """Process a logged value; return whether the plateau is reached."""
        self.unlogged.found()
        if math.isfinite(value):
            while self._history and self._history[-1][0] >= step:
                self._history.pop()
            self._history.append((step, value))
        return self.detector.update(step, value)

    @guarded
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, and what a report of the run needs, as JSON types."""
        history = [list(observation) for observation in self._history]
        return {**self.detector.state_dict(), "monitor": self.monitor, "settings": self.settings, "history": history}

    @guarded
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; with other settings the observations are judged by the new ones."""
        detector = PlateauDetector(**self.settings)
        # First, since it raises for what is no state.
        detector.load_state_dict(state_dict)
        history = deque(((int(step), float(value)) for step, value in state_dict["history"]), maxlen=_KEPT)
        if state_dict["settings"] != self.settings:
            detector = PlateauDetector(**self.settings)
            for step, value in history:
                detector.update(step, value)
        self.detector, self._history = detector, history
        if history:
            self.unlogged.found()

    def logged_values(self) -> dict[str, float]:
        """Return the trend, once there are two observations, and the number of observations since progress."""
        trend = {} if self.detector.trend is None else {f"plateau/{self.monitor}": self.detector.trend}
        return {**trend, f"plateau/{self.monitor}/since_progress": float(self.detector.since_progress)}

    def say_stop(self) -> None:
        """Print one line on why, at which step and at which value."""
        print(f"Stopping: {self.monitor}: {self.detector.reason}")

    def warn_if_never_logged(self, logged: Iterable[str]) -> None:
        """Warn at the end of a run if the name was never logged, unless that was told before."""
        self.unlogged.at_end(logged)
