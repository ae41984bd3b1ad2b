"""Warns of names that are never logged, as soon as that can be known."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from matent_callbacks.accumulate.catalogue import METRICS

_OF_EVALUATION = re.compile(r"(eval|val|valid|validation|test)[_/]")
_OF_OBSERVERS = ("plateau/", "collapse/")
# Between the slashes of the names that callbacks log of a model.
_MEASURED = (*METRICS, "diff_erank", "alignment")
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
        self._source = _source_of(monitor)

    def found(self) -> None:
        """Called when the name was logged."""
        self.settled = True

    def begin(self, step: int) -> None:
        """Called when training begins, or goes on, at ``step``."""
        self.start = step
        self.was_evaluated = self._was_checked = False

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
        if self.settled or self._was_checked:
            return
        if self._source == "evaluation":
            due, after = self.was_evaluated, "the first evaluation"
        elif self._source == "measurement":
            due, after = _all_have_measured(callbacks, self.start, step), "the first readings"
        else:
            due, after = recorded and self._source == "training", "the first record"
        if not due:
            return
        self._was_checked = True
        names = list(logged())
        # A name of training is misspelled if one of the logged ones is much like it. But Lightning logs one value under
        # two names, that of the epoch later.
        is_misspelled = not self._monitor.endswith("_epoch") and _similar(self._monitor, names)
        if self._source != "training" or is_misspelled:
            self._warn(names, after)

    def at_end(self, logged: Iterable[str]) -> None:
        """Called when training ends."""
        self._warn(logged, "")

    def _warn(self, logged: Iterable[str], after: str) -> None:
        if self.settled:
            return
        self.settled = True
        names = sorted(logged)
        near = difflib.get_close_matches(self._monitor, names, n=4, cutoff=0.4) or names
        advice = f" Told after {after}; a value that is logged later still counts." if after else ""
        warnings.warn(
            f"`monitor` {self._monitor!r} was never logged, so {self._without}. Near: {', '.join(near)}.{advice}",
            stacklevel=4,
        )


def _source_of(monitor: str) -> Literal["evaluation", "observer", "measurement", "training"]:
    """Return what logs a name, so far as it can be told from the name."""
    if _OF_EVALUATION.match(monitor):
        return "evaluation"
    if monitor.startswith(_OF_OBSERVERS):
        return "observer"
    parts = monitor.split("/")
    return "measurement" if len(parts) > 1 and any(_similar(part, _MEASURED) for part in parts) else "training"


def _all_have_measured(callbacks: Iterable[Any], start: int, step: int) -> bool:
    """Whether callbacks measure in training, and each has logged its first values of a run that began at ``start``."""
    intervals = [callback.steps_until_logged for callback in callbacks if hasattr(callback, "steps_until_logged")]
    return bool(intervals) and all(start // interval < step // interval for interval in intervals)


def _similar(name: str, names: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name, list(names), n=1, cutoff=_SIMILAR))
