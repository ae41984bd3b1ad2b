"""Shared by all pictures: axis units, colours, and reading a logged key as a curve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

UNITS = {
    "matrix_entropy": "matrix entropy (nats)",
    "sequence_matrix_entropy": "matrix entropy (nats)",
    "effective_rank": "effective rank (dimensions)",
    "sequence_effective_rank": "effective rank (dimensions)",
}
# Differences of a factor matter, not those of so many dimensions.
LOGARITHMIC = {
    "effective_rank",
    "sequence_effective_rank",
    "rankme",
    "participation_ratio",
    "stable_rank",
    "numerical_rank",
}
# Okabe & Ito's colours, told apart under every common colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"
FIVE = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")


def in_order(layers: Iterable[str]) -> list[str]:
    """Sort layer names with numbers as numbers, and ``last`` last."""

    def place(name: str) -> tuple[bool, list[tuple[int, str]]]:
        return name == "last", [(len(p), p) if p.isdigit() else (0, p) for p in re.split(r"(\d+)", name)]

    return sorted(layers, key=place)


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged key, in the order of the steps; the last record of a step counts.

    Args:
        records: What a Trainer logged: ``trainer.state.log_history``, or the ``log_history`` of ``trainer_state.json``.
        key: A logged name, such as ``loss`` or ``matrix_entropy/last``.

    Returns:
        Steps and values.

    Example:
        >>> from matent_callbacks.plot import series
        >>> series([{"step": 2, "loss": 0.5}, {"step": 1, "loss": 1.0}, {"step": 2}], "loss")
        ([1, 2], [1.0, 0.5])
    """
    found = {record["step"]: record[key] for record in records if key in record}
    return sorted(found), [found[step] for step in sorted(found)]
