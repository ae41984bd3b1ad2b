"""Tells which readings of image-text pairs are of the same pairs, so that a probe does not pass for two data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.report._keys import Quantity
from matent_callbacks.report._run import Curve, Run


class Pairs(NamedTuple):
    """Readings that are of the same pairs, as far as the log shows."""

    sources: Sequence[str | None]
    """What they are logged as: at training steps (``None``), and at evaluations by the name of the held-out data."""

    @property
    def name(self) -> str:
        """What the pairs are called. Those of an evaluation can be a probe of training pairs: they are not held out."""
        if None in self.sources:
            return "probe of pairs"
        names = ", ".join(filter(None, self.sources))
        return f"pairs at evaluations{f' ({names})' if names else ''}"

    def curve(self, run: Run, metric: str, place: str) -> Curve:
        """All their readings of a quantity, in the order of the steps."""
        found: dict[float, float] = {}
        for source in reversed(self.sources):
            found.update(zip(*run.curve(Quantity(metric, place, source)), strict=True))
        return Curve(sorted(found), [found[step] for step in sorted(found)])


def pairs(run: Run) -> list[Pairs]:
    """Group what was logged of pairs, training steps first: the same pairs have equal readings wherever both were read.

    A callback with a fixed probe measures it at training steps and at evaluations alike.
    """
    groups: list[list[str | None]] = []
    for source in sorted({q.held_out for q in _quantities(run)}, key=lambda name: (name is not None, name or "")):
        same = (group for group in groups if any(_are_same(run, source, other) for other in group))
        group = next(same, None)
        if group is None:
            groups.append([source])
        else:
            group.append(source)
    return [Pairs(group) for group in groups]


def stages(run: Run, metric: str, places: Sequence[str]) -> tuple[str, dict[str, Curve]]:
    """Return the name of the first pairs of which a metric of any of the places was logged, and its curves."""
    for group in pairs(run):
        curves = {place: group.curve(run, metric, place) for place in places}
        if any(curve.finite().values for curve in curves.values()):
            return group.name, curves
    return "", {}


def _quantities(run: Run) -> list[Quantity]:
    return [q for q in run.keys if q.metric == "alignment" or q.place in (*STAGES, *TOWERS)]


def _are_same(run: Run, one: str | None, other: str | None) -> bool:
    """Whether all quantities are equal at the steps that have both; false if there are no such steps."""
    compared = []
    for quantity in _quantities(run):
        if quantity.held_out == one:
            theirs = dict(zip(*run.curve(quantity._replace(held_out=other)).finite(), strict=True))
            mine = zip(*run.curve(quantity).finite(), strict=True)
            compared += [math.isclose(value, theirs[step], rel_tol=1e-5) for step, value in mine if step in theirs]
    return bool(compared) and all(compared)
