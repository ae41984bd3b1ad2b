"""Downsamples the curves of a long run without hiding their peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from matent_callbacks.report._run import Curve

T = TypeVar("T")


def peaks(curve: Curve, limit: int = 800) -> Curve:
    """Keep the first, lowest, highest and last point of each of ``limit / 4`` equal stretches; NaN stays a gap."""
    count = len(curve.steps)
    if count <= limit:
        return curve
    kept: set[int] = set()
    size = math.ceil(4 * count / limit)
    for begin in range(0, count, size):
        stretch = range(begin, min(begin + size, count))
        finite = [i for i in stretch if math.isfinite(curve.values[i])]
        kept |= {stretch[0], stretch[-1]}
        if finite:
            kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)}
    chosen = sorted(kept)
    return Curve([curve.steps[i] for i in chosen], [curve.values[i] for i in chosen])


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """Keep the first point, the last one, and evenly spaced ones between them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
