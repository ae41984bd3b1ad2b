"""Shared by all pictures: axis units and scales, colours, and reading a logged key as a curve."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from matent_callbacks.accumulate.catalogue import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis, XAxis, YAxis
    from matplotlib.lines import Line2D

UNITS = {name: metric.label for name, metric in METRICS.items()}
# Metrics whose ratios matter, not their differences.
LOGARITHMIC = tuple(name for name, metric in METRICS.items() if metric.logarithmic)
# Okabe & Ito's colours, which can be told apart with every common colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"
BLACK = "#000000"
FIVE = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")
# Of changes: the neutral middle is a grey that is no glare on a dark page.
DIVERGING = ("#00304C", BLUE, "#D0D0D0", ORANGE, "#5C2800")
_DECADE = 10
_ALARM = "collapse/"
_Item = TypeVar("_Item")


def in_order(layers: Iterable[str]) -> list[str]:
    """Sort layer names in natural order, with ``last`` at the end."""
    return sorted(layers, key=lambda name: (name == "last", numbers_as_numbers(name)))


def evenly(items: Sequence[_Item], limit: int) -> list[_Item]:
    """Keep the first item, the last one, and evenly spaced ones between them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """Sort key for names: ``layer_9`` before ``layer_10``."""
    # By length and digits: a number from a log may be too long for `int`.
    parts = (part.lstrip("0") if part.isdigit() else part for part in re.split(r"(\d+)", name))
    return [(len(part), part) if part.isdigit() else (0, part) for part in parts]


def change_of(metric: str, first: float, value: float) -> float:
    """Return how far a value is from the first: the difference, or for ranks and lengths the logarithm of the ratio."""
    if metric not in LOGARITHMIC:
        return value - first
    first, value = (max(number, sys.float_info.min) for number in (first, value))
    return math.log(value / first)


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


def alarms(records: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Steps at which the alarm on each logged key was raised, from what was logged as ``collapse/<key>``."""
    found: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(_ALARM) and value > 0:
                found.setdefault(key.removeprefix(_ALARM), []).append(record["step"])
    return found


def mark(
    ax: Axes, *, stop: float | None = None, alarm_steps: Iterable[float] = (), on_cells: bool = False
) -> list[Line2D]:
    """Draw vertical lines where a plateau was reached and where alarms were raised, with their names for the legend.

    On the cells of a heat map, which have every colour, each line has a white one below it. Cells are the same on a
    dark page, so lines on them do not get its colours.
    """
    from matplotlib import rcParams

    black, orange = ("#010101", "#C24E00") if on_cells else (rcParams["text.color"], ORANGE)
    steps = sorted(set(alarm_steps))
    for step in [*steps, *([] if stop is None else [stop])] if on_cells else ():
        ax.axvline(step, color="white", linewidth=3.5)
    lines = []
    for i, step in enumerate(steps):
        label = f"_{i}" if i else f"collapse, {'from ' * (len(steps) > 1)}step {step:g}"
        lines.append(ax.axvline(step, color=orange, linestyle=(0, (1, 1)), linewidth=1.8, label=label))
    if stop is not None:
        label = f"plateau, step {stop:g}"
        lines.append(ax.axvline(stop, color=black, linestyle="--", linewidth=1.5 if on_cells else 1, label=label))
    return lines


def layer_ticks(axis: XAxis | YAxis, layers: Sequence[str], most: int, shift: float = 0.0) -> None:
    """Name at most ``most`` layers on an axis, evenly spaced, always with the last one."""
    last = len(layers) - 1
    every = -(-len(layers) // most)
    every = next((n for n in range(every, 2 * every) if last % n == 0), every)
    shown = [*range(0, last - every + 1, every), last]
    names = [short(layers[i], 20) for i in shown]
    axis.set_ticks([i + shift for i in shown], names, parse_math=False)
    if axis.axis_name == "x" and max(map(len, names)) > 4:
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


def short(label: str, limit: int = 30) -> str:
    """Shorten long module names in the middle, where they say least."""
    return label if len(label) <= limit else f"{label[: limit // 2 - 1]}…{label[-limit // 2 :]}"


def rank_scale(ax: Axes) -> None:
    """Make the vertical axis logarithmic if the curves on it span more than a decade and none goes down to zero."""
    import numpy as np

    # Without lines across the whole axis, such as marks.
    curves = [line.get_ydata() for line in ax.get_lines() if line.get_transform() is ax.transData]
    values = np.concatenate([np.asarray(values, dtype=float) for values in curves] or [np.empty(0)])
    finite = values[np.isfinite(values)].tolist()
    if finite and min(finite) > 0 and max(finite) > _DECADE * min(finite):
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)


def plain_numbers(axis: Axis) -> None:
    """Write the numbers on a logarithmic axis as people do, not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 8 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if high > 2 * low else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())
