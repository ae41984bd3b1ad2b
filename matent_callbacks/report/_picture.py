"""What all pictures of a page share: words and numbers, an empty figure, and how a figure is finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from matent_callbacks.report._run import Curve
from matent_callbacks.report._svg import SIZE
from matent_callbacks.report._thin import evenly
from matent_callbacks.report._words import number, step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS, _LABEL = 60, 30
_LEGEND_ROWS, _LEGEND_ROW = 4, 0.19  # rows that fit, and inches for each further one


class Picture(NamedTuple):
    """A picture with its words and its numbers."""

    name: str
    title: str
    caption: str
    svg: str
    columns: Sequence[str]
    rows: list[list[str]]
    table_caption: str
    wide: bool = False
    """Whether it is as wide as the page."""
    runs: Sequence[int] = ()
    """Which of several runs are drawn in it, by their place on the page."""


def empty_figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """Create a figure with one axis, in the size that fits a card of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def finish(figure: Figure, ax: Axes, *, legend: bool = True) -> None:
    """Label the steps with whole numbers, and put the legend below the picture."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if ax.get_xlabel() == "step":
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if math.fabs(ax.get_xlim()[1]) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: step_label(value)))
    labels = [label for label in ax.get_legend_handles_labels()[1] if not label.startswith("_")]
    if legend and labels:
        # Two columns where the two longest labels have room beside each other.
        fits = sum(sorted(map(len, labels))[-2:]) <= 40
        columns = 2 if fits and len(labels) > 1 else 1
        # A long legend makes the picture taller, and does not shrink what it shows.
        more = math.ceil(len(labels) / columns) - _LEGEND_ROWS
        figure.set_figheight(figure.get_figheight() + max(0, more) * _LEGEND_ROW)
        figure.legend(loc="outside lower center", ncols=columns)


def step_label(value: float) -> str:
    """Format a step of a long run for an axis."""
    return f"{value / 1000:,.4g} k" if value else "0"


def short(label: str, limit: int = _LABEL) -> str:
    """Shorten long module names in the middle, where they say least."""
    return label if len(label) <= limit else f"{label[: limit // 2 - 1]}…{label[-limit // 2 :]}"


def table_over_steps(curves: dict[str, Curve]) -> tuple[list[str], list[list[str]], str]:
    """Return columns, rows and caption of the table of curves, at evenly spaced steps where there are many."""
    steps = sorted({s for curve in curves.values() for s in curve.steps})
    values = [dict(zip(*curve, strict=True)) for curve in curves.values()]
    rows = [[step(s), *(number(column[s]) if s in column else "" for column in values)] for s in evenly(steps, _ROWS)]
    return ["step", *curves], rows, how_many(len(rows), len(steps))


def how_many(rows: int, total: int) -> str:
    """Say how many of the steps the table has; empty if it has all of them."""
    return f"{rows} of {total:,} steps, evenly spaced." if rows < total else ""
