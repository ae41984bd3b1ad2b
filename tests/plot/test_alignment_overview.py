"""The picture of a multimodal run shows what was logged, and of the exchanged images what follows from it."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from matent_callbacks.plot import alignment_overview

mpl.use("agg")

RECORDS = [
    {"step": 2, "loss": 3.0},
    {"step": 2, "eval_loss": 3.5},
    {"step": 2, "alignment/image_text": 0.75, "alignment/image_text_shift": 0.25, "alignment/grounding": 0.5},
    {"step": 4, "eval_loss": 2.0, "alignment/cka_z": 3.0},
    {"step": 6, "alignment/image_text": 0.5, "alignment/grounding": 1.0, "alignment/cka_debiased": 0.125},
]


def curves(axis):
    lines = [line for line in axis.get_lines() if not line.get_label().startswith(("_", "plateau"))]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_exchanged_images_beside_the_pairs():
    figure = alignment_overview(RECORDS, stop=4, probe_is_held_out=True)
    losses, grounding, chance, alignment, debiased, readings = figure.axes
    assert curves(losses)["held out"] == ([2, 4], [3.5, 2.0])
    assert curves(losses)["held out, images exchanged"] == ([2], [4.0])  # where both were logged
    assert curves(alignment) == {"pairs": ([2, 6], [0.75, 0.5]), "images exchanged": ([2], [1.0])}
    assert curves(chance)["linear CKA"] == ([4], [3.0])
    assert any(list(line.get_ydata()) == [0.5, 1.0] for line in grounding.get_lines())
    assert any(list(line.get_ydata()) == [0.125] for line in debiased.get_lines())
    for axis in (losses, grounding, chance, alignment, debiased, readings):
        assert any(list(line.get_xdata()) == [4, 4] for line in axis.get_lines())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plateau, step 4"]
    # A legend is below its plot, and hides nothing.
    figure.canvas.draw()
    for axis in (losses, chance, alignment):
        assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0


def test_grounding_of_other_pairs_is_not_added_to_the_held_out_loss():
    """As a probe is not said to be held out, whether evaluations read it, too, or not."""
    for prefix in ("", "eval_"):
        records = [{**record} for record in RECORDS]
        records[2][f"{prefix}alignment/grounding"] = 0.5
        losses, grounding, *_ = alignment_overview(records).axes
        assert curves(losses) == {"training": ([2], [3.0]), "held out": ([2, 4], [3.5, 2.0])}
        assert any(list(line.get_ydata()) == [0.5, 1.0] for line in grounding.get_lines())
        assert grounding.get_ylabel() == "grounding on the probe (nats per token)"
    grounding = alignment_overview(RECORDS, probe_is_held_out=True).axes[1]
    assert grounding.get_ylabel() == "grounding (nats per token)"


def test_the_readings_alone():
    readings, alignment, losses = alignment_overview(
        [{"step": 1, "alignment/image_text": 0.5, "effective_rank/text": 2.0, "loss": 1.0, "eval_loss": 3.0}]
    ).axes
    assert curves(readings)["text"] == ([1], [2.0])
    assert list(curves(alignment)) == ["pairs"]
    assert curves(losses) == {"training": ([1], [1.0]), "held out": ([1], [3.0])}


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="must hold values of `alignment/image_text`"):
        alignment_overview([{"step": 1, "loss": 2.0}])
