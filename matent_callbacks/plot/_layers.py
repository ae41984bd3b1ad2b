"""All layers in one picture: a profile through the depth, and a heat map over steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._style import LOGARITHMIC, ORANGE, UNITS, in_order, rank_scale, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROFILES = 12  # more lines than that could not be told apart


def layer_profile(records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes) -> None:
    """Draw the metric through the layers, one line for each step that was read, the latest standing out.

    Of many readings twelve are drawn, evenly spread, the first and the latest among them. Ranks that span more than a
    decade are on a logarithmic axis.

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
    shown = sorted({round(i * last / (_PROFILES - 1)) for i in range(_PROFILES)})
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
    every = -(-len(layers) // 16)
    ax.set_xticks(range(0, len(layers), every), layers[::every], rotation=45, ha="right")
    ax.set_ylabel(UNITS.get(metric, metric))
    handles = ax.get_lines()
    ax.legend(handles=[handles[0], handles[-1]] if last else handles, frameon=False, fontsize="small")


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
    image = ax.pcolormesh(_edges(steps), range(len(layers) + 1), grid, cmap="viridis", norm=norm)
    ax.set_yticks([i + 0.5 for i in range(len(layers))], layers)
    ax.set_xlabel("step")
    ax.figure.colorbar(image, ax=ax, label=UNITS.get(metric, metric))


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


def _edges(steps: list[float]) -> list[float]:
    """Boundaries of the cells around the steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
