"""All layers in one picture: a profile through the depth, and a heat map over steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._style import (
    LOGARITHMIC,
    ORANGE,
    UNITS,
    evenly,
    in_order,
    layer_ticks,
    plain_numbers,
    rank_scale,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROFILES, _NAMED = 12, 5  # more lines could not be told apart, more names would hide them


def layer_profile(records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes) -> None:
    """Draw the metric through the layers, one line for each step that was read, the latest standing out.

    Of many readings twelve are drawn and five are named, evenly spread, the first and the latest among them. Ranks that
    span more than a decade are on a logarithmic axis.

    Args:
        records: What a Trainer logged.
        metric: The metric whose layers are shown.
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
    from matplotlib import colormaps

    layers, steps, grid = _table(records, metric)
    last = len(steps) - 1
    shown = evenly(range(len(steps)), _PROFILES)
    greys = colormaps["Greys"]
    for index in shown:
        latest = index == last
        ax.plot(
            range(len(layers)),
            [row[index] for row in grid],
            color=ORANGE if latest else greys(0.25 + 0.5 * index / max(last, 1)),
            linewidth=2.2 if latest else 1,
            marker="o",
            markersize=4 if latest else 2,
            label=f"step {steps[index]}",
        )
    if metric in LOGARITHMIC:
        rank_scale(ax)
    layer_ticks(ax.xaxis, layers, 16)
    ax.set_ylabel(UNITS.get(metric, metric))
    _title(ax, metric, "by depth")
    ax.legend(handles=evenly(ax.get_lines(), _NAMED), frameon=False, fontsize="small")


def layer_heatmap(records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes) -> None:
    """Draw layer by step, one cell for each reading, ranks on a logarithmic scale; the embeddings are at the bottom.

    Args:
        records: What a Trainer logged.
        metric: The metric whose layers are shown.
        ax: The axis to draw on.

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
    from matplotlib.colors import LogNorm

    layers, steps, grid = _table(records, metric)
    # A logarithmic scale needs a value above 0; NaN, a layer without a reading, is no value.
    norm = LogNorm() if metric in LOGARITHMIC and any(v > 0 for row in grid for v in row) else None
    # Rasterized, since each cell would be an element of an SVG.
    cells = ax.pcolormesh(_edges(steps), range(len(layers) + 1), grid, cmap="viridis", norm=norm, rasterized=True)
    layer_ticks(ax.yaxis, layers, _rows(ax), shift=0.5)
    ax.set_xlabel("step")
    _title(ax, metric, "of every layer")
    ax.grid(False)
    bar = ax.figure.colorbar(cells, ax=ax, label=UNITS.get(metric, metric), fraction=0.05, pad=0.03, aspect=30)
    if norm is not None:
        plain_numbers(bar.ax.yaxis)


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


def _rows(ax: Axes) -> int:
    """How many labels fit above one another beside an axis."""
    line = 1.1 * ax.yaxis.get_ticklabels()[0].get_fontproperties().get_size_in_points() / 72
    return max(2, int(ax.bbox.height / ax.figure.dpi / line))


def _title(ax: Axes, metric: str, what: str) -> None:
    """Set the title, unless the axis has one."""
    if not ax.get_title():
        ax.set_title(f"{metric[:1].upper()}{metric[1:].replace('_', ' ')} {what}")


def _edges(steps: list[float]) -> list[float]:
    """Boundaries of the cells around the steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
