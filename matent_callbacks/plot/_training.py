"""A training run: effective rank of every layer beside the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._style import BLUE, ORANGE, UNITS, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layer_heatmap(records: Iterable[Mapping[str, Any]], metric: str = "effective_rank", *, ax: Axes) -> None:
    """Draw layer by step, one cell for each reading, on a logarithmic scale; the embeddings are at the bottom.

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

    records = list(records)
    prefix = f"{metric}/"
    layers = sorted({key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)})
    layers = [layer for layer in layers if layer != "last"] + ["last"] * ("last" in layers)
    if not layers:
        raise ValueError(f"`records` must hold values of `{metric}/<layer>`, and none was found.")
    columns = {layer: dict(zip(*series(records, prefix + layer), strict=True)) for layer in layers}
    steps = sorted({step for column in columns.values() for step in column})
    grid = [[columns[layer].get(step, float("nan")) for step in steps] for layer in layers]
    image = ax.pcolormesh(_edges(steps), range(len(layers) + 1), grid, cmap="viridis", norm=LogNorm())
    ax.set_yticks([i + 0.5 for i in range(len(layers))], layers)
    ax.set_xlabel("step")
    ax.figure.colorbar(image, ax=ax, label=UNITS.get(metric, metric))


def training_overview(records: Iterable[Mapping[str, Any]], *, title: str = "") -> Figure:
    """One picture of a run: effective rank of every layer over steps, beside the loss and the last layer's entropy.

    Args:
        records: What a Trainer logged with ``MatrixEntropyCallback(layers="all")``.
        title: Above the picture.

    Returns:
        The figure; ``figure.savefig("run.png")`` writes it.

    Raises:
        ValueError: If no record has an effective rank.

    Example:
        >>> from matent_callbacks.plot import training_overview
        >>> records = [{"step": s, "loss": 3 - s, "effective_rank/last": s, "matrix_entropy/last": s} for s in (1, 2)]
        >>> len(training_overview(records).axes)  # heat map, its colour bar, and two curves
        4
    """
    import matplotlib.pyplot as plt

    records = list(records)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(1.15, 1))
    layer_heatmap(records, ax=left)
    left.set_title("Effective rank, layer by layer")

    right.plot(*series(records, "loss"), color=BLUE, alpha=0.85, label="training loss")
    right.plot(*series(records, "eval_loss"), color=BLUE, linestyle="none", marker="o", label="held-out loss")
    right.set_xlabel("step")
    right.set_ylabel("loss (nats per token)", color=BLUE)
    entropy = right.twinx()
    entropy.plot(*series(records, "matrix_entropy/last"), color=ORANGE, label="matrix entropy, last layer")
    entropy.set_ylabel(UNITS["matrix_entropy"], color=ORANGE)
    right.set_title("Loss and the entropy of the last layer")
    lines = [line for axis in (right, entropy) for line in axis.get_lines() if len(line.get_xdata())]
    figure.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _edges(steps: list[float]) -> list[float]:
    """Boundaries of cells that have the steps in their middle."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
