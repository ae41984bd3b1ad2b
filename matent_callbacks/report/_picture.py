"""What all pictures of a page share: their style and colours, the SVG that they become, and their tables."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from xml.etree import ElementTree

from matent_callbacks.plot._style import BLACK, BLUE, FIVE, ORANGE, evenly
from matent_callbacks.report._run import Curve
from matent_callbacks.report._words import number, step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (4.2, 3.1)
_ROWS = 60
_LEGEND_ROWS, _LEGEND_ROW = 4, 0.19  # rows that fit, and inches for each further one
# A colour that is readable on white is not readable on black, so the page has one of each.
_COLOURS = {
    BLUE.lower(): "var(--blue)",
    ORANGE.lower(): "var(--orange)",
    BLACK: "currentColor",
    **{colour.lower(): f"var(--five-{i})" for i, colour in enumerate(FIVE)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "matent",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # dollar signs in a name do not make it a formula
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "black",
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
}
_REFERENCE = re.compile(r"^#|(?<=url\(#)")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


Table: TypeAlias = tuple[Sequence[str], list[list[str]], str]
"""Columns, rows and caption."""


class Picture(NamedTuple):
    """A picture with its words and its numbers."""

    name: str
    title: str
    caption: str
    svg: str
    """Its text is escaped. Of a wide picture there are two, for narrow and for wide pages."""
    columns: Sequence[str]
    rows: list[list[str]]
    table_caption: str
    wide: bool
    """Whether it is as wide as the page."""
    runs: Mapping[int, str]
    """Which of several runs are drawn in it, by their place on the page, and what the legend calls them."""


@contextmanager
def style() -> Iterator[None]:
    """Let figures created inside fit the page, whatever the user's own matplotlib settings are."""
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": matplotlib.rcParams["backend"]}):
        yield


def css_colour(colour: str) -> str:
    """Return the CSS value of the page for a colour of the pictures."""
    return _COLOURS[colour.lower()]


def empty_figure(width: float = _SIZE[0], height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    """Create a figure with one axis, in the size that fits a card of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def picture(
    figures: Sequence[Figure],
    name: str,
    title: str,
    description: Iterable[str],
    table: Table,
    caption: Iterable[str] = (),
    *,
    legend: bool = True,
    runs: Mapping[int, str] = MappingProxyType({}),
) -> Picture:
    """Make a picture of a figure, or of two for narrow and wide pages, created inside :func:`style`.

    ``name`` is the prefix of every id, so that several pictures can be in one page, ``description`` is for screen
    readers, and empty sentences of ``caption`` are left out. ``legend``: below the picture. ``runs`` are those of
    several runs that are drawn, by their place on the page; they are the tooltips of ``run<place>``.
    """
    text = " ".join(description)
    tooltips = {f"run{place}": label for place, label in runs.items()}
    svgs = []
    for figure, suffix in zip(figures, ("", "-wide"), strict=False):
        _finish(figure, figure.axes[0], legend)
        svgs.append(_svg(figure, name + suffix, title, text, tooltips))
    return Picture(name, title, " ".join(filter(None, caption)), "".join(svgs), *table, len(svgs) > 1, runs)


def _svg(figure: Figure, name: str, title: str, description: str, tooltips: Mapping[str, str]) -> str:
    """Render a figure as an ``svg`` element with real text and the colours of the page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, dpi=200, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for element in list(root.iter()):
        if element.get("id") in tooltips:
            element.insert(0, _text("title", tooltips[element.get("id", "")]))
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.items()):
            del element.attrib[key]
            value = f"{name}-{value}" if key == "id" else _REFERENCE.sub(rf"\g<0>{name}-", value)
            if key == "style":
                value = _COLOUR.sub(lambda m: _COLOURS.get(m[0], m[0]), value)
            element.set(key.rpartition("}")[2], value)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    root[:0] = [_text("title", title, id=f"{name}-title"), _text("desc", description, id=f"{name}-desc")]
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _text(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, attributes)
    element.text = text
    return element


def _finish(figure: Figure, ax: Axes, legend: bool) -> None:
    """Label the steps with whole numbers, break a long unit, and put the legend below the picture."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_ylabel(textwrap.fill(ax.get_ylabel(), 34))
    if ax.get_xlabel() == "step":
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if math.fabs(ax.get_xlim()[1]) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at / 1000:,.4g} k" if at else "0"))
    labels = [label for label in ax.get_legend_handles_labels()[1] if not label.startswith("_")]
    if legend and labels:
        # Two columns where the two longest labels have room beside each other.
        fits = sum(sorted(map(len, labels))[-2:]) <= 40
        columns = 2 if fits and len(labels) > 1 else 1
        # A long legend makes the picture taller, and does not shrink what it shows.
        more = math.ceil(len(labels) / columns) - _LEGEND_ROWS
        figure.set_figheight(figure.get_figheight() + max(0, more) * _LEGEND_ROW)
        figure.legend(loc="outside lower center", ncols=columns)


def table_over_steps(curves: Mapping[str, Curve]) -> Table:
    """Return columns, rows and caption of the table of curves, at evenly spaced steps where there are many."""
    steps = sorted({s for curve in curves.values() for s in curve.steps})
    values = [dict(zip(*curve, strict=True)) for curve in curves.values()]
    rows = [[step(s), *(number(column[s]) if s in column else "" for column in values)] for s in evenly(steps, _ROWS)]
    return ["step", *curves], rows, how_many(len(rows), len(steps))


def how_many(rows: int, total: int) -> str:
    """Say how many of the steps the table has; empty if it has all of them."""
    return f"{rows} of {total:,} steps, evenly spaced." if rows < total else ""


def peaks(curve: Curve, limit: int = 800) -> Curve:
    """Keep the first, lowest, highest and last point of each of ``limit / 4`` equal stretches; NaN stays a gap."""
    count = len(curve.steps)
    if count <= limit:
        return curve
    kept: set[int] = set()
    size = math.ceil(4 * count / limit)
    for begin in range(0, count, size):
        stretch = range(begin, min(begin + size, count))
        kept |= {stretch[0], stretch[-1]}
        if finite := [i for i in stretch if math.isfinite(curve.values[i])]:
            kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)}
    chosen = sorted(kept)
    return Curve([curve.steps[i] for i in chosen], [curve.values[i] for i in chosen])
