"""Draws a multimodal run: losses, grounding, agreement of image and text, and the five readings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.plot._style import BLUE, FIVE, ORANGE, UNITS, mark, rank_scale, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Records = list[Mapping[str, Any]]


def alignment_overview(
    records: Iterable[Mapping[str, Any]],
    *,
    stop: int | None = None,
    title: str = "",
    probe_is_held_out: bool = False,
) -> Figure:
    """One picture of a multimodal run: the five readings and the alignment over steps, beside the losses.

    If grounding or debiased measures were logged, there are three more plots: the grounding, the z scores of the
    pairing, and the debiased CKA. Then the alignment with exchanged images is drawn as well.

    Args:
        records: What a Trainer logged with ``AlignmentCallback`` on a vision-language model.
        stop: The step that is marked as the one at which the plateau was reached.
        title: Above the picture.
        probe_is_held_out: Whether the probe of the callback is the data of ``eval_loss``, which the records do not say.
            Then the held-out loss with exchanged images is drawn beside the losses: ``eval_loss`` plus
            ``alignment/grounding``, where both were logged at one step. Of a probe of other pairs this sum means
            nothing.

    Returns:
        The figure.

    Raises:
        ValueError: If no record has an alignment.

    Example:
        >>> from matent_callbacks.plot import alignment_overview
        >>> records = [{"step": s, "alignment/image_text": 0.5, "effective_rank/text": s} for s in (1, 2)]
        >>> len(alignment_overview(records).axes)
        3
        >>> len(alignment_overview([{**record, "alignment/grounding": 0.1} for record in records]).axes)
        6
    """
    import matplotlib.pyplot as plt

    records = list(records)
    if not series(records, "alignment/image_text")[0]:
        raise ValueError("`records` must hold values of `alignment/image_text`, and none was found.")
    losses, grounding = (partial(panel, probe_is_held_out=probe_is_held_out) for panel in (_losses, _grounding))
    panels: list[Callable[[Axes, _Records], None]] = [_readings, _alignment, losses]
    if any(f"alignment/{name}" in record for record in records for name in ("grounding", "cka_z", "cka_debiased")):
        panels = [losses, grounding, _against_chance, _alignment, _debiased, _readings]
    rows = len(panels) // 3
    figure, axes = plt.subplots(
        rows, 3, figsize=(14, 4.2 if rows == 1 else 7.6), layout="constrained", squeeze=False, sharex=True
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel(axis, records)
        axis.xaxis.set_tick_params(labelbottom=True)
        axis.set_xlabel("step")
        # Below the plot, where it hides no curve.
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize="small")
        marks = mark(axis, stop=stop)
    if marks:
        figure.legend(handles=marks, loc="outside lower right", frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _readings(axis: Axes, records: _Records) -> None:
    for stage, colour in zip(STAGES, FIVE, strict=True):
        axis.plot(*series(records, f"effective_rank/{stage}"), color=colour, label=stage.replace("_", " "))
    rank_scale(axis)
    axis.set(ylabel=UNITS["effective_rank"], title="Where the image goes")


def _alignment(axis: Axes, records: _Records) -> None:
    axis.plot(*series(records, "alignment/image_text"), color=BLUE, label="pairs")
    exchanged = _sum(records, "alignment/image_text", "alignment/image_text_shift")
    if exchanged[0]:
        axis.plot(*exchanged, color=ORANGE, linestyle="--", label="images exchanged")
    axis.set(ylabel="mean / max of image, text, both", title="Image-text alignment of the paper")


def _losses(axis: Axes, records: _Records, probe_is_held_out: bool) -> None:
    exchanged = _sum(records, "eval_loss", "alignment/grounding") if probe_is_held_out else ([], [])
    axis.plot(*series(records, "loss"), color=FIVE[0] if exchanged[0] else BLUE, alpha=0.85, label="training")
    if exchanged[0]:
        axis.plot(*series(records, "eval_loss"), color=BLUE, label="held out")
        axis.plot(*exchanged, color=ORANGE, label="held out, images exchanged")
    else:
        axis.plot(*series(records, "eval_loss"), color=ORANGE, marker="o", label="held out")
    axis.set(ylabel="captioning loss (nats per token)", title="Loss")


def _grounding(axis: Axes, records: _Records, probe_is_held_out: bool) -> None:
    unit = f"grounding {'' if probe_is_held_out else 'on the probe '}(nats per token)"
    _from_zero(axis, records, "grounding", unit, "What the right image is worth")


def _debiased(axis: Axes, records: _Records) -> None:
    _from_zero(axis, records, "cka_debiased", "debiased CKA", "Similarity of image and text")


def _from_zero(axis: Axes, records: _Records, measure: str, unit: str, title: str) -> None:
    axis.axhline(0, color="0.5", alpha=0.4, linewidth=1)
    axis.plot(*series(records, f"alignment/{measure}"), color=BLUE)
    axis.set(ylabel=unit, title=title)


def _against_chance(axis: Axes, records: _Records) -> None:
    axis.axhspan(-2, 2, color="0.5", alpha=0.2, zorder=0, label="chance (95 %)")
    axis.plot(*series(records, "alignment/cka_z"), color=BLUE, label="linear CKA")
    axis.plot(*series(records, "alignment/mutual_knn_z"), color=ORANGE, label="mutual kNN")
    axis.set(ylabel="z (standard deviations)", title="Pairing of image and text above chance")


def _sum(records: _Records, first: str, second: str) -> tuple[list[float], list[float]]:
    """Sum of two keys at the steps that have both."""
    values = dict(zip(*series(records, first), strict=True))
    added = zip(*series(records, second), strict=True)
    found = {step: values[step] + value for step, value in added if step in values}
    return list(found), list(found.values())
