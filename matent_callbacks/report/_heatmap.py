"""Draws the heat map of every layer, as wide as the page: its cells are stretched, its text is not."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from matent_callbacks.plot import layer_heatmap
from matent_callbacks.plot._style import UNITS
from matent_callbacks.report._picture import short, step_label
from matent_callbacks.report._run import Run
from matent_callbacks.report._words import number, step

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# In CSS pixels: the margins around the cells, and a row, a letter and the colour bar.
_TOP, _BELOW, _RIGHT, _ROW, _LETTER, _BAR = 48, 26, 14, 20, 7.3, 132
_MOST_ROWS, _LEAST_HEIGHT = 40, 160
_PLATEAU, _COLLAPSE = ("#010101", "8 5"), ("var(--orange)", "5 3")


class _Cells(NamedTuple):
    """What matplotlib has drawn: the cells without axes, and what the axes would have shown."""

    png: bytes
    bar: bytes
    scale: tuple[float, float]
    steps: tuple[float, float]
    ticks: list[float]
    layers: list[str]


def heatmap_svg(
    records: list[dict[str, float]], metric: str, *, run: Run, name: str, title: str, description: str
) -> str:
    """Draw the cells of :func:`~matent_callbacks.plot.layer_heatmap` between axes that keep their size at every width.

    Args:
        records: The readings that are shown.
        metric: The metric whose layers they are.
        run: The run whose plateau and alarms are marked.
        name: Prefix of every id, so that several heat maps can be in one page.
        title: Title, for screen readers.
        description: Description, for screen readers.
    """
    cells = _cells(records, metric)
    names = [short(layer, 20) for layer in cells.layers]
    height = max(_LEAST_HEIGHT, min(len(names), _MOST_ROWS) * _ROW)
    bottom, margin = _TOP + height, 12 + math.ceil(_LETTER * max(map(len, names)))
    svg = ElementTree.Element(
        "svg", {"class": "stretched", "role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    )
    svg.set("style", f"height: {bottom + _BELOW}px")
    _add(svg, "title", title, id=f"{name}-title")
    _add(svg, "desc", description, id=f"{name}-desc")
    _bar(svg, cells, UNITS.get(metric, metric))
    inside = f"height: {height}px; width: calc(100% - {margin + _RIGHT}px)"
    _image(svg, cells.png, x=0, y=_TOP, style=f"x: {margin}px; {inside}")
    every = math.ceil(len(names) * _ROW / height)
    for i in {*range(0, len(names) - every + 1, every), len(names) - 1}:
        y = _TOP + height * (1 - (i + 0.5) / len(names)) + 4
        _add(svg, "text", names[i], x=margin - 8, y=round(y, 1), **{"text-anchor": "end"})

    def place(at: float) -> dict[str, str]:
        """Return where a step is: a share of the whole width, corrected for margins, which are not stretched."""
        share = (at - cells.steps[0]) / (cells.steps[1] - cells.steps[0])
        return {
            "x": f"{100 * share:.3f}%",
            "transform": f"translate({margin - share * (margin + _RIGHT):.2f} 0)",
        }

    for tick in cells.ticks:
        label = step_label(tick) if cells.steps[1] >= 10_000 else step(tick)
        _add(svg, "text", label, y=bottom + 18, **{"text-anchor": "middle"}, **place(tick))
    _add(svg, "text", "step", x=margin - 8, y=bottom + 18, **{"text-anchor": "end"})
    marks = [(at, *_COLLAPSE) for at in run.alarm_steps]
    if run.stop:
        marks.append((run.stop.step, *_PLATEAU))
    for at, colour, dashes in marks:
        where = place(at)
        ends = {"x1": where["x"], "x2": where["x"], "transform": where["transform"], "y1": _TOP, "y2": bottom}
        # On cells of every colour: light below, the colour of the mark above, in both themes.
        _add(svg, "line", **ends, stroke="white", **{"stroke-width": 4})
        _add(svg, "line", **ends, stroke=colour, **{"stroke-width": 2, "stroke-dasharray": dashes})
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def _cells(records: list[dict[str, float]], metric: str) -> _Cells:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4))
    ax = figure.add_subplot()
    layer_heatmap(records, metric, ax=ax)
    mesh = ax.collections[0]
    left, right = ax.get_xlim()
    layers = [label.get_text() for label in ax.get_yticklabels()]
    for other in figure.axes[1:]:
        other.remove()
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ticks = [t for t in MaxNLocator(4, integer=True).tick_values(left, right) if left <= t <= right]
    low, high = mesh.get_clim()
    assert low is not None  # something was drawn
    assert high is not None
    return _Cells(_png(figure), _bar_png(mesh.get_cmap()), (low, high), (left, right), ticks, layers)


def _bar_png(colours: Colormap) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.56, 0.1))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.imshow([[i / 255 for i in range(256)]], cmap=colours, aspect="auto")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True, dpi=150, metadata={"Software": None})
    return file.getvalue()


def _bar(svg: ElementTree.Element, cells: _Cells, unit: str) -> None:
    """Write what the colours mean above the cells, from the lowest to the highest."""
    low, high = map(number, cells.scale)
    begin = round(_LETTER * len(low)) + 8
    _add(svg, "text", unit, x=0, y=12)
    _add(svg, "text", low, x=0, y=34)
    _image(svg, cells.bar, x=begin, y=24, width=_BAR, height=11)
    _add(svg, "path", d=f"M{begin} 24h{_BAR}v11h-{_BAR}z", fill="none", stroke="var(--quiet)")
    _add(svg, "text", high, x=begin + _BAR + 8, y=34)


def _image(svg: ElementTree.Element, png: bytes, **attributes: Any) -> None:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    _add(svg, "image", **attributes, preserveAspectRatio="none", href=source)


def _add(parent: ElementTree.Element, tag: str, text: str = "", /, **attributes: Any) -> None:
    element = ElementTree.SubElement(parent, tag, {name: str(value) for name, value in attributes.items()})
    element.text = text
