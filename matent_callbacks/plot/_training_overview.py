"""Draws a training run: effective rank of every layer beside the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._layers import layer_heatmap
from matent_callbacks.plot._style import BLUE, ORANGE, UNITS, alarms, mark, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_overview(records: Iterable[Mapping[str, Any]], *, title: str = "") -> Figure:
    """One picture of a run: effective rank of every layer over steps, beside the loss and the last layer's entropy.

    Where alarms of a collapse were logged (``collapse/<key>``), their steps are marked.

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
    right.set_ylabel("loss", color=BLUE)
    entropy = right.twinx()
    entropy.plot(*series(records, "matrix_entropy/last"), color=ORANGE, label="matrix entropy, last layer")
    entropy.set_ylabel(UNITS["matrix_entropy"], color=ORANGE)
    right.set_title("Loss and the entropy of the last layer")
    raised = [step for steps in alarms(records).values() for step in steps]
    mark(left, alarm_steps=raised, on_cells=True)
    mark(right, alarm_steps=raised)
    lines = [line for axis in (right, entropy) for line in axis.get_lines() if len(line.get_xdata())]
    lines = [line for line in lines if not str(line.get_label()).startswith("_")]
    figure.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False)
    if title:
        figure.suptitle(title)
    return figure
