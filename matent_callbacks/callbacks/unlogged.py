"""Warns of names that are never logged, as soon as that can be known."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.callbacks.alignment_callback import SharedAlignmentCallback
from matent_callbacks.callbacks.entropy_callback import SharedEntropyCallback

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
        """Whether the name was logged, or a warning said that it was not."""
        self.begin(0)
        self._monitor = monitor
        self._without = without
        self._of_evaluation = bool(_OF_EVALUATION.match(monitor))
        self._of_observations = monitor.startswith(_OF_OBSERVATIONS)
        parts = monitor.split("/")
        self._of_readings = len(parts) > 1 and any(_similar(part, _OF_READINGS) for part in parts)

    def found(self) -> None:
        """Called when the name was logged."""
        self.settled = True

    def begin(self, step: int) -> None:
        """Called when training begins, or goes on, at ``step``."""
        self.start = step
        self.was_evaluated = self._had_readings = self._had_record = False

    def check(
        self, logged: Callable[[], Iterable[str]], step: int, callbacks: Iterable[Any], *, recorded: bool
    ) -> None:
        """Warn if the first record of the name has been due.

        Args:
            logged: Returns all names that were logged until ``step``, also by the ``callbacks``.
            step: The last step of which everything was logged.
            callbacks: Those of the Trainer.
            recorded: Whether the training's own values were logged.
        """
        if self.settled:
            return
        if self.was_evaluated:
            self.was_evaluated = False
            if self._of_evaluation:
                self._warn(logged(), "the first evaluation")
        if not self._had_readings and had_first_readings(callbacks, self.start, step):
            self._had_readings = True
            if self._of_readings and not self._of_evaluation and not self._of_observations:
                self._warn(logged(), "the first readings")
        if not self._had_record and recorded:
            self._had_record = True
            # Such a name is misspelled if one of the logged ones is much like it. But Lightning logs one value under
            # two names, that of the epoch later.
            elsewhere = self._of_evaluation or self._of_readings or self._of_observations
            names = list(logged())
            if not elsewhere and not self._monitor.endswith("_epoch") and _similar(self._monitor, names):
                self._warn(names, "the first record")

    def at_end(self, logged: Iterable[str]) -> None:
        """Called when training ends."""
        self._warn(logged, "")

    def _warn(self, logged: Iterable[str], after: str) -> None:
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
    intervals: list[int] = []
    for callback in callbacks:
        if isinstance(callback, SharedEntropyCallback):
            # A reading in the background is logged at the next one.
            intervals.append(callback.every_n_steps * (2 if callback._measurement.background else 1))
        elif isinstance(callback, SharedAlignmentCallback):
            intervals.append(callback.every_n_steps)
    return bool(intervals) and all(start // interval < step // interval for interval in intervals)


def _similar(name: str, names: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name, list(names), n=1, cutoff=_SIMILAR))
