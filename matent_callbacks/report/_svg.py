"""Renders matplotlib figures as inline SVG with real text and the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from matent_callbacks.plot._style import BLUE, FIVE, ORANGE, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.2, 3.1)
# A colour that is readable on white is not readable on black, so the page has one of each.
_COLOURS = {
    BLUE.lower(): "var(--blue)",
    ORANGE.lower(): "var(--orange)",
    "#000000": "currentColor",
    **{colour.lower(): f"var(--five-{i})" for i, colour in enumerate(FIVE)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "matent",
    # Dollar signs in a name do not make it a formula.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "black",
    "axes.grid": True,
    "grid.color": "black",
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "text.color": "black",
    "axes.labelcolor": "black",
    "xtick.color": "black",
    "ytick.color": "black",
}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


@contextmanager
def style() -> Iterator[None]:
    """Let figures created inside fit the page, whatever the user's own matplotlib settings are."""
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": matplotlib.rcParams["backend"]}):
        yield


def css_colour(colour: str) -> str:
    """Return the CSS value of the page for a colour of the pictures."""
    return _COLOURS[colour.lower()]


def to_svg(
    figure: Figure, *, name: str, title: str, description: str, tooltips: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Render the figure as an ``svg`` element, with a title and a description for screen readers.

    Args:
        figure: Created inside :func:`style`.
        name: Prefix of every id, so that several pictures can be in one page.
        title: Title, for screen readers.
        description: Description, for screen readers.
        tooltips: The tooltips of parts of the figure, by the part's ``gid``.
    """
    for axis in figure.axes:
        _write_plainly(axis)
        for collection in axis.collections:
            collection.set_rasterized(True)  # each cell of a heat map would be an element
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        if element.get("id") in tooltips:
            hint = ElementTree.Element("title")
            hint.text = tooltips[element.get("id", "")]
            element.insert(0, hint)
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = _REFERENCE.sub(rf"url(#{name}-\1)", element.attrib.pop(key))
            key = key.rpartition("}")[2]
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            elif key == "style":
                value = _COLOUR.sub(lambda m: _COLOURS.get(m[0], m[0]), value)
                # SVG's default fill is black.
                value += "; fill: currentColor" * (element.tag == "text" and "fill" not in value)
            element.set(key, value)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _write_plainly(axis: Axes) -> None:
    """Write plain numbers on logarithmic axes: matplotlib's own labels are mathematics, which is switched off."""
    from matplotlib.ticker import NullFormatter

    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log" and not isinstance(side.get_minor_formatter(), NullFormatter):
            plain_numbers(side)
