"""Pictures of a run, from the records that a Trainer keeps.

Needs matplotlib: ``pip install 'matent-callbacks[plot]'``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.functional.alignment import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = {
    "matrix_entropy": "matrix entropy (nats)",
    "sequence_matrix_entropy": "matrix entropy (nats)",
    "effective_rank": "effective rank (dimensions)",
    "sequence_effective_rank": "effective rank (dimensions)",
}
# Okabe & Ito's colours, told apart under every common colour blindness.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_FIVE = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")


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
    ax.figure.colorbar(image, ax=ax, label=_UNITS.get(metric, metric))


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

    right.plot(*series(records, "loss"), color=_BLUE, alpha=0.85, label="training loss")
    right.plot(*series(records, "eval_loss"), color=_BLUE, linestyle="none", marker="o", label="held-out loss")
    right.set_xlabel("step")
    right.set_ylabel("loss (nats per token)", color=_BLUE)
    entropy = right.twinx()
    entropy.plot(*series(records, "matrix_entropy/last"), color=_ORANGE, label="matrix entropy, last layer")
    entropy.set_ylabel(_UNITS["matrix_entropy"], color=_ORANGE)
    right.set_title("Loss and the entropy of the last layer")
    lines = [line for axis in (right, entropy) for line in axis.get_lines() if len(line.get_xdata())]
    figure.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def alignment_overview(records: Iterable[Mapping[str, Any]], *, stop: int | None = None, title: str = "") -> Figure:
    """One picture of a multimodal run: the five readings and the alignment over steps, beside the losses.

    Args:
        records: What a Trainer logged with ``AlignmentCallback`` on a vision-language model.
        stop: The step that is marked as the one at which the plateau was reached.
        title: Above the picture.

    Returns:
        The figure.

    Raises:
        ValueError: If no record has an alignment.

    Example:
        >>> from matent_callbacks.plot import alignment_overview
        >>> records = [{"step": s, "alignment/image_text": 0.5, "effective_rank/text": s} for s in (1, 2)]
        >>> len(alignment_overview(records).axes)
        3
    """
    import matplotlib.pyplot as plt

    records = list(records)
    if not series(records, "alignment/image_text")[0]:
        raise ValueError("`records` must hold values of `alignment/image_text`, and none was found.")
    figure, (ranks, alignment, losses) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for stage, colour in zip(STAGES, _FIVE, strict=True):
        ranks.plot(*series(records, f"effective_rank/{stage}"), color=colour, label=stage.replace("_", " "))
    ranks.set_ylabel(_UNITS["effective_rank"])
    ranks.set_title("Where the image goes")
    ranks.legend(frameon=False, fontsize="small")
    alignment.plot(*series(records, "alignment/image_text"), color=_BLUE)
    alignment.set_ylabel("mean / max of image, text, both")
    alignment.set_title("Image-text alignment" + ("" if stop is None else f", plateau at step {stop}"))
    losses.plot(*series(records, "loss"), color=_BLUE, alpha=0.85, label="training")
    losses.plot(*series(records, "eval_loss"), color=_ORANGE, marker="o", label="held out")
    losses.set_ylabel("captioning loss (nats per token)")
    losses.set_title("Loss")
    losses.legend(frameon=False, fontsize="small")
    for axis in (ranks, alignment, losses):
        axis.set_xlabel("step")
        if stop is not None:
            axis.axvline(stop, color="black", linestyle="--", linewidth=1)
    if title:
        figure.suptitle(title)
    return figure


def _edges(steps: list[float]) -> list[float]:
    """Boundaries of cells that have the steps in their middle."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
