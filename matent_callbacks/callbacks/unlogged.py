"""Warns that a monitored name was never logged."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


def warn_never_logged(monitor: str, logged: Iterable[str], without: str) -> None:
    """Warn that ``monitor`` was not among the names that were logged, and what could not be done ``without`` it."""
    names = sorted(logged)
    near = difflib.get_close_matches(monitor, names, n=4, cutoff=0.4) or names
    warnings.warn(
        f"`monitor` {monitor!r} was never logged, so {without}. Near: {', '.join(near)}.",
        stacklevel=4,
    )
