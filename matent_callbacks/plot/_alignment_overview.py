"""A multimodal run: the five readings and the alignment beside the losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.plot._style import BLUE, FIVE, ORANGE, UNITS, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    for stage, colour in zip(STAGES, FIVE, strict=True):
        ranks.plot(*series(records, f"effective_rank/{stage}"), color=colour, label=stage.replace("_", " "))
    ranks.set_ylabel(UNITS["effective_rank"])
    ranks.set_title("Where the image goes")
    ranks.legend(frameon=False, fontsize="small")
    alignment.plot(*series(records, "alignment/image_text"), color=BLUE)
    alignment.set_ylabel("mean / max of image, text, both")
    alignment.set_title("Image-text alignment" + ("" if stop is None else f", plateau at step {stop}"))
    losses.plot(*series(records, "loss"), color=BLUE, alpha=0.85, label="training")
    losses.plot(*series(records, "eval_loss"), color=ORANGE, marker="o", label="held out")
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
