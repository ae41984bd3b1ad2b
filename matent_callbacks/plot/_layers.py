"""All layers in one picture: a profile through the depth, and a heat map over steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._style import (
    DIVERGING,
    FIVE,
    LOGARITHMIC,
    ORANGE,
    UNITS,
    change_of,
    evenly,
    in_order,
    layer_ticks,
    plain_numbers,
    rank_scale,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROFILES = 6  # more lines could not be told apart
_FACTORS = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 1e4, 1e5)


def layer_profile(records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes) -> None:
    """Draw the metric through the layers, one line for each step that was read, the latest standing out.

    Of many readings six are drawn, evenly spread, the first and the latest among them, and the legend says so. Ranks
    that span more than a decade are on a logarithmic axis.

    Args:
        records: What a Trainer logged.
        metric: The metric whose layers are shown, such as ``drift``.
        ax: The axis to draw on.

    Raises:
        ValueError: If no record has the metric.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from matent_callbacks.plot import layer_profile
        >>> figure, ax = plt.subplots()
        >>> layer_profile([{"step": s, "effective_rank/layer_00": s, "effective_rank/last": 3} for s in (1, 2)], ax=ax)
        >>> [line.get_label() for line in ax.get_lines()]
        ['step 1', 'step 2']
    """
    layers, steps, grid = _table(records, metric)
    shown = evenly(range(len(steps)), _PROFILES)
    for colour, index in zip(FIVE, shown[:-1], strict=False):
        ax.plot([row[index] for row in grid], color=colour, marker="o", ms=2, lw=1, label=f"step {steps[index]}")
    ax.plot([row[-1] for row in grid], color=ORANGE, marker="o", ms=4, lw=2.2, label=f"step {steps[-1]}")
    if metric in LOGARITHMIC:
        rank_scale(ax)
    layer_ticks(ax.xaxis, layers, min(16, int(_inches(ax)[0] / 0.3)))
    ax.set_ylabel(UNITS.get(metric, metric.replace("_", " ")))
    _title(ax, metric, " by depth")
    # Beside the plot, where it hides no line, if the layout of the figure makes room for it.
    beside: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if ax.figure.get_layout_engine() else {}
    title = f"{len(shown)} of {len(steps)} readings" if len(shown) < len(steps) else None
    ax.legend(title=title, frameon=False, fontsize="small", title_fontsize="small", **beside)


def layer_heatmap(
    records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes, change: bool = False
) -> None:
    """Draw layer by step, one cell for each reading, ranks on a logarithmic scale; the embeddings are at the bottom.

    Args:
        records: What a Trainer logged.
        metric: The metric whose layers are shown.
        ax: The axis to draw on.
        change: Draw how far each layer is from its first value: differences, or of ranks and lengths ratios. No change
            is grey, a decrease blue and an increase orange, on one scale.

    Raises:
        ValueError: If no record has the metric.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from matent_callbacks.plot import layer_heatmap
        >>> figure, ax = plt.subplots()
        >>> layer_heatmap([{"step": 1, "effective_rank/last": 3.0}], ax=ax)
        >>> ax.get_xlabel()
        'step'
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    layers, steps, grid = _table(records, metric)
    name, ratios, norm = UNITS.get(metric, metric.replace("_", " ")), metric in LOGARITHMIC, None
    colours: Any = "viridis"
    if change:
        grid = [_changes(metric, row) for row in grid]
        farthest = max((abs(v) for row in grid for v in row if math.isfinite(v)), default=0.0) or 1.0
        norm, colours = Normalize(-farthest, farthest), LinearSegmentedColormap.from_list("change", DIVERGING)
        name = f"{name.partition(' (')[0]}, times its first value" if ratios else f"change of {name}"
    elif ratios and any(v > 0 for row in grid for v in row):
        # A logarithmic scale needs a value above 0; NaN, a layer without a reading, is no value.
        norm = LogNorm()
    # Rasterized, since each cell would be an element of an SVG.
    cells = ax.pcolormesh(_edges(steps), range(len(layers) + 1), grid, cmap=colours, norm=norm, rasterized=True)
    # How many labels fit above one another.
    line = 1.1 * ax.yaxis.get_ticklabels()[0].get_fontproperties().get_size_in_points() / 72
    layer_ticks(ax.yaxis, layers, max(2, int(_inches(ax)[1] / line)), shift=0.5)
    ax.set_xlabel("step")
    _title(ax, metric, ": change since the first measurement" if change else " of every layer")
    ax.grid(False)
    bar = ax.figure.colorbar(cells, ax=ax, label=name, fraction=0.05, pad=0.03, aspect=30)
    if change:
        ticks, labels = _change_ticks(farthest, ratios=ratios)
        bar.set_ticks(ticks, labels=labels)
    elif norm is not None:
        plain_numbers(bar.ax.yaxis)
        # A bar that is not told of them puts its own in their place when the limits of the colours are set.
        bar.locator, bar.formatter = bar.ax.yaxis.get_major_locator(), bar.ax.yaxis.get_major_formatter()
        bar.minorformatter = bar.ax.yaxis.get_minor_formatter()


def _changes(metric: str, values: list[float]) -> list[float]:
    """How far the values of a layer are from the first; NaN where there is none, or no ratio."""
    counted = [v if math.isfinite(v) and (v > 0 or metric not in LOGARITHMIC) else math.nan for v in values]
    first = next((v for v in counted if v == v), math.nan)
    return [change_of(metric, first, v) if v == v else v for v in counted]


def _change_ticks(farthest: float, *, ratios: bool) -> tuple[list[float], list[str]]:
    """A few ticks, at the same distances on both sides of no change, with their labels."""
    from matplotlib.ticker import MaxNLocator

    if not ratios:
        found = MaxNLocator(6, symmetric=True).tick_values(-farthest, farthest)
        ticks = [float(tick) for tick in found if abs(tick) <= farthest]
        return ticks, [f"{tick:+.3g}" if tick else "0" for tick in ticks]
    inside = [math.log(factor) for factor in _FACTORS if math.log(factor) <= farthest]
    shown = {*inside[-1:], *sorted(inside, key=lambda at: abs(at - inside[-1] / 2))[:1]}
    ticks = sorted({0.0, *shown, *(-at for at in shown)})
    return ticks, [f"{math.exp(tick):.{3 if abs(tick) > 0.009 else 4}g}" for tick in ticks]


def _table(records: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[str], list[float], list[list[float]]]:
    """Collect layers, steps, and a table of values (layers x steps) with NaN where there is none."""
    records = list(records)
    prefix = f"{metric}/"
    layers = in_order({key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)})
    if not layers:
        raise ValueError(f"`records` must hold values of `{metric}/<layer>`, and none was found.")
    columns = {layer: dict(zip(*series(records, prefix + layer), strict=True)) for layer in layers}
    steps = sorted({step for column in columns.values() for step in column})
    return layers, steps, [[columns[layer].get(step, float("nan")) for step in steps] for layer in layers]


def _inches(ax: Axes) -> tuple[float, float]:
    """Width and height of an axis."""
    return ax.bbox.width / ax.figure.dpi, ax.bbox.height / ax.figure.dpi


def _title(ax: Axes, metric: str, what: str) -> None:
    """Set the title, unless the axis has one."""
    if not ax.get_title():
        ax.set_title(f"{metric[:1].upper()}{metric[1:].replace('_', ' ')}{what}")


def _edges(steps: list[float]) -> list[float]:
    """Boundaries of the cells around the steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
