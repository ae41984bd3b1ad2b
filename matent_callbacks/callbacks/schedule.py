"""Which optimizer steps are due, and which forwards are read for them."""

from __future__ import annotations

import warnings
from typing import Literal


class Schedule:
    """Follows the steps of a run. Steps are numbers of optimizer steps that are done.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        window_steps: Number of steps that a measurement of training forwards covers, the last of which is due.

    Raises:
        ValueError: If one is out of range.
    """

    def __init__(self, every_n_steps: int, window_steps: int) -> None:
        check_every_n_steps(every_n_steps)
        is_whole = isinstance(window_steps, int) and not isinstance(window_steps, bool)
        if not (is_whole and 1 <= window_steps <= every_n_steps):
            raise ValueError(
                f"`window_steps` must be a whole number from 1 to `every_n_steps`, {every_n_steps}, "
                f"got {window_steps!r}."
            )
        self.step = 0
        self._every = every_n_steps
        self._window = window_steps
        self._most = 0
        self._skipped = self._overdue = False

    def reads(self, step: int, *, completes: int | None) -> bool:
        """Whether a forward of training after ``step`` steps is read: it may belong to one that is due.

        ``completes``: how many steps it is part of at most. ``None``: that is not known. The largest number that any
        has completed is assumed, and any before the first.
        """
        self.step = step
        most = self._most if completes is None else completes
        reads = self._overdue or most == 0 or self._is_due(step + most + self._window - 1)
        self._skipped |= not reads
        return reads

    def ends(self, step: int) -> bool:
        """Go on to ``step``; whether any of the steps since the last one until then is due."""
        due = self._is_due(step)
        self._most = max(self._most, step - self.step)
        self.step = step
        return due

    def outcome(self, *, due: bool) -> Literal["measure", "keep", "discard"]:
        """Return what becomes of what was read until the step that is over: a measurement is of all forwards or none.

        A step that was not expected to be due, because a batch made more steps than any before it, is measured with the
        next batch.
        """
        due = due or self._overdue
        skipped, self._skipped = self._skipped, False
        self._overdue = due and skipped
        if due and not skipped:
            return "measure"
        in_window = -self.step % self._every < self._window
        return "keep" if due or skipped or in_window else "discard"

    def discard_step(self) -> bool:
        """Forget a step that will not end; whether what was read of it is to be discarded, and is not of a window."""
        self._skipped = False
        return self._window == 1

    def _is_due(self, step: int) -> bool:
        return step // self._every > self.step // self._every


def check_every_n_steps(every_n_steps: int) -> None:
    """Raise ValueError unless it is a whole number above 0."""
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ValueError(f"`every_n_steps` must be a whole number above 0, got {every_n_steps!r}.")


def warn_if_never_due(every_n_steps: int, last_step: int | None, *, at_end: bool) -> None:
    """Warn if all steps of a run are fewer than ``every_n_steps``, and say whether it is measured ``at_end``."""
    if last_step is not None and 0 < last_step < every_n_steps:
        warnings.warn(
            f"`every_n_steps` is {every_n_steps}, and training ends at step {last_step}: "
            f"{'only its end is measured' if at_end else 'no step of it is measured'}.",
            stacklevel=4,
        )
