"""Warns of names that are never logged, as soon as that can be known."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import Any

from matent_callbacks.accumulate.catalogue import CATALOGUE

_OF_EVALUATION = re.compile(r"(eval|val|valid|validation|test)[_/]")
# Parts of the names that callbacks log at each of their readings.
_OF_READINGS = (*CATALOGUE, "diff_erank", "alignment")
_OF_OBSERVATIONS = ("plateau/", "collapse/")
_SIMILAR = 0.75


class Unlogged:
    """Knows whether a monitored name was logged, and warns once when its first record would have been due.

    Args:
        monitor: The name, or a glob.
        without: What could not be done without it.
    """

    def __init__(self, monitor: str, without: str) -> None:
        self.settled = False
        """Whether the name was logged, or it was told that it was not."""
        self._monitor = monitor
        self._without = without
        self._of_evaluation = bool(_OF_EVALUATION.match(monitor))
        self._of_observations = monitor.startswith(_OF_OBSERVATIONS)
        parts = monitor.split("/")
        self._of_readings = len(parts) > 1 and any(_similar(part, _OF_READINGS) for part in parts)

    def found(self) -> None:
        """Called when the name was logged."""
        self.settled = True

    def after_evaluation(self, logged: Iterable[str]) -> None:
        """Called when all records of an evaluation have been made."""
        if self._of_evaluation:
            self._tell(logged, "the first evaluation")

    def after_readings(self, logged: Iterable[str]) -> None:
        """Called when every callback that measures has had its first reading in training."""
        if self._of_readings and not self._of_evaluation and not self._of_observations:
            self._tell(logged, "the first readings")

    def after_record(self, logged: Iterable[str]) -> None:
        """Called after a record of the training's own values: the name is misspelled if one of them is much like it."""
        names = list(logged)
        elsewhere = self._of_evaluation or self._of_readings or self._of_observations
        # Lightning logs one value under both names, that of the epoch later.
        if not elsewhere and not self._monitor.endswith("_epoch") and _similar(self._monitor, names):
            self._tell(names, "the first record")

    def at_end(self, logged: Iterable[str]) -> None:
        """Called when training ends."""
        self._tell(logged, "")

    def _tell(self, logged: Iterable[str], after: str) -> None:
        if self.settled:
            return
        self.settled = True
        names = sorted(logged)
        near = difflib.get_close_matches(self._monitor, names, n=4, cutoff=0.4) or names
        told = f" Told after {after}; a value that is logged later still counts." if after else ""
        warnings.warn(
            f"`monitor` {self._monitor!r} was never logged, so {self._without}. Near: {', '.join(near)}.{told}",
            stacklevel=4,
        )


def had_first_readings(callbacks: Iterable[Any], start: int, step: int) -> bool:
    """Whether callbacks measure in training, and each has logged its first reading of a run that began at ``start``."""
    intervals = [callback.steps_until_logged for callback in callbacks if hasattr(callback, "steps_until_logged")]
    return bool(intervals) and all(start // interval < step // interval for interval in intervals)


def _similar(name: str, names: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name, list(names), n=1, cutoff=_SIMILAR))
