"""What both frameworks' ``PlateauStopping`` log and say."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

from matent_callbacks.plateau import PlateauDetector


def logged_values(monitor: str, detector: PlateauDetector) -> dict[str, float]:
    """The trend, once there are two observations, and how many there were since progress."""
    trend = {} if detector.trend is None else {f"plateau/{monitor}": detector.trend}
    return {**trend, f"plateau/{monitor}/since_progress": float(detector.since_progress)}


def say_stop(monitor: str, detector: PlateauDetector) -> None:
    """One line on why, at which step and at which value."""
    print(f"Stopping: {monitor}: {detector.reason}")


def warn_never_logged(monitor: str, logged: Iterable[str]) -> None:
    """Tell that a name was never seen, with the names that were."""
    names = sorted(logged)
    near = difflib.get_close_matches(monitor, names, n=4, cutoff=0.4) or names
    warnings.warn(
        f"`monitor` {monitor!r} was never logged, so training could not stop on it. Near: {', '.join(near)}.",
        stacklevel=3,
    )
