"""Confidence intervals of a mean over sequences in one pass, by the Poisson bootstrap.

Each sequence counts in each replicate a number of times drawn from Poisson(1) (Chamandy et al., "Estimating uncertainty
for massive data streams", 2012). The draws of a sequence depend on the seed and its place in the text alone, so a
resumed run equals an uninterrupted one, and two models measured on the same text have paired replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
LEVEL = 0.95

Floats = NDArray[np.float64]


def draws(seed: int, documents: Sequence[int]) -> Floats:
    """Draw how often each document counts: ``(documents, 1 + REPLICATES)``, the first column all ones."""
    counts = np.ones((len(documents), 1 + REPLICATES))
    for row, document in zip(counts, documents, strict=True):
        row[1:] = np.random.Generator(np.random.Philox(key=[seed, document])).poisson(1.0, REPLICATES)
    return counts


class Means:
    """The mean of one value per sequence and of its replicates, ``(1 + REPLICATES,)``; memory is O(REPLICATES)."""

    def __init__(self, total: Floats | None = None, weight: Floats | None = None) -> None:
        self.total = np.zeros(1 + REPLICATES) if total is None else total
        self.weight = np.zeros(1 + REPLICATES) if weight is None else weight

    def add(self, values: Floats, counts: Floats) -> None:
        """Add sequences: ``(S,)`` values, NaN where there is none, and ``(S, 1 + REPLICATES)`` draws."""
        there = np.isfinite(values)
        self.total += values[there] @ counts[there]
        self.weight += counts[there].sum(0)

    def merge(self, other: Means) -> None:
        """Add the sequences of another."""
        self.total += other.total
        self.weight += other.weight

    @property
    def count(self) -> int:
        """Sequences with a value."""
        return int(self.weight[0])

    def replicates(self) -> Floats:
        """Return the mean, and that of each replicate; NaN for a replicate that drew no sequence."""
        return np.divide(self.total, self.weight, out=np.full_like(self.total, np.nan), where=self.weight > 0)

    def state(self) -> dict[str, Floats]:
        """What :meth:`from_state` takes."""
        return {"total": self.total, "weight": self.weight}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Means:
        """Restore what :meth:`state` returned."""
        return cls(state["total"].copy(), state["weight"].copy())


def interval(replicates: Floats, *, count: int) -> dict[str, float | None]:
    """Turn ``(1 + REPLICATES,)`` into the value and the ends of its percentile interval.

    ``count`` is the number of sequences: a single one is the same in every replicate, and has no interval.
    """
    value, spread = replicates[0], replicates[1:][np.isfinite(replicates[1:])]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if count < 2:
        return {"value": float(value), "low": None, "high": None}
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}
