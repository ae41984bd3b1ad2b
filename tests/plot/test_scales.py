"""Ranks that span more than a decade are on a logarithmic axis, whatever draws them, and alarms are marked."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from matent_callbacks.callbacks.layer_pictures import LayerPictures
from matent_callbacks.plot import (
    _layers,
    alignment_overview,
    layer_heatmap,
    layer_profile,
    step_curves,
    training_overview,
)

mpl.use("agg")


def axis():
    return Figure().add_subplot()


def labels(ax):
    ax.figure.canvas.draw()
    return [text.get_text() for text in ax.get_yticklabels()]


@pytest.mark.parametrize(
    ("values", "ranks", "scale"),
    [
        ([60.0, 2.0, 5.0], True, "log"),
        ([60.0, 2.0, 5.0], False, "linear"),
        ([60.0, 7.0, float("nan")], True, "linear"),
        ([60.0, 0.0, 5.0], True, "linear"),  # a collapsed numerical rank has no logarithm
        ([float("nan")] * 3, True, "linear"),
    ],
)
def test_curves(values, ranks, scale):
    ax = axis()
    step_curves({"last": ([1, 2, 3], values)}, ax=ax, unit="effective rank (dimensions)", ranks=ranks, stop=2)
    assert ax.get_yscale() == scale
    if scale == "log":
        assert {"2", "5", "10", "20", "50"} <= set(labels(ax))


def test_what_spans_is_all_curves_together_and_no_mark():
    ax = axis()
    curves = {"a": ([1, 2], [50.0, 40.0]), "b": ([1, 2], [4.0, 3.0])}
    step_curves(curves, ax=ax, unit="dimensions", ranks=True, alarms=[1, 2])
    assert ax.get_yscale() == "log"
    ax = axis()
    # From 0 to 1 in the coordinates of the axis.
    step_curves({"a": ([1, 2], [50.0, 40.0])}, ax=ax, unit="dimensions", ranks=True, alarms=[1, 2], stop=2)
    assert ax.get_yscale() == "linear"
    named = [text for text in ax.get_legend_handles_labels()[1] if not text.startswith("_")]
    assert named == ["a", "collapse, from step 1", "plateau, step 2"]


def test_profile_and_overviews():
    for high, scale in ((60.0, "log"), (20.0, "linear")):
        records = [{"step": s, "effective_rank/layer_00": high, "effective_rank/last": 3.0} for s in (1, 2)]
        ax = axis()
        layer_profile(records, ax=ax)
        assert ax.get_yscale() == scale
        multimodal = [
            {"step": s, "alignment/image_text": 1.0, "effective_rank/text": high, "effective_rank/image": 3.0}
            for s in (1, 2)
        ]
        assert alignment_overview(multimodal).axes[0].get_yscale() == scale
    ax = axis()
    layer_profile([{"step": 1, "matrix_entropy/a": 4.0, "matrix_entropy/last": 0.1}], "matrix_entropy", ax=ax)
    assert ax.get_yscale() == "linear"


def test_the_loggers_picture(monkeypatch):
    scales = []
    usual = _layers.layer_profile

    def watched(records, metric, *, ax):
        usual(records, metric, ax=ax)
        scales.append(ax.get_yscale())

    monkeypatch.setattr("matent_callbacks.plot.layer_profile", watched)
    records = [{"step": s, "effective_rank/layer_00": 90.0, "effective_rank/last": 2.0} for s in (1, 2)]
    drawn = LayerPictures(["effective_rank"]).draw(records, ["layer_00", "last"], last=True)
    assert len(drawn) == 2
    assert scales == ["log"]


def test_alarms_in_the_overview():
    records = [{"step": s, "loss": 1.0, "effective_rank/last": 2.0, "matrix_entropy/last": 1.0} for s in range(1, 9)]
    assert "collapse" not in " ".join(t.get_text() for t in training_overview(records).legends[0].get_texts())
    records[4]["collapse/effective_rank/last"] = 1.0
    figure = training_overview(records)
    assert [t.get_text() for t in figure.legends[0].get_texts()][-2:] == [
        "collapse, step 5",
        "matrix entropy, last layer",
    ]
    for ax in (figure.axes[0], figure.axes[2] if len(figure.axes) > 4 else figure.axes[1]):
        assert any(list(line.get_xdata()) == [5, 5] for line in ax.get_lines())


def depth(layers):
    """A log of that many layers and the last, whose values go through two decades."""
    names = [*(f"layer_{i:02d}" for i in range(layers)), "last"]
    return [{"step": s, **{f"effective_rank/{n}": 4.0 + s * i for i, n in enumerate(names)}} for s in (1, 5, 9)]


@pytest.mark.parametrize("layers", [2, 12, 30, 61])
def test_names_of_layers_do_not_run_into_each_other(layers):
    for axis_of, draw in (("yaxis", layer_heatmap), ("xaxis", layer_profile)):
        figure = Figure(figsize=(7, 4), layout="constrained")
        ax = figure.add_subplot()
        draw(depth(layers), ax=ax)
        figure.canvas.draw()
        named = getattr(ax, axis_of).get_ticklabels()
        assert [named[0].get_text(), named[-1].get_text()] == ["layer_00", "last"]
        assert len(named) > min(layers, 6)
        if axis_of == "yaxis":
            boxes = [label.get_window_extent() for label in named]
            assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
        assert ax.get_title()


def test_the_legend_names_every_line_and_says_how_many_there_are_and_a_title_is_kept():
    ax = axis()
    ax.set_title("mine")
    layer_profile([{"step": s, "effective_rank/last": 2.0, "effective_rank/a": 1.0} for s in range(1, 101)], ax=ax)
    assert len({line.get_color() for line in ax.get_lines()}) == 6
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"step {s}" for s in (1, 21, 41, 60, 80, 100)]
    assert ax.get_legend().get_title().get_text() == "6 of 100 readings"
    assert ax.get_title() == "mine"


def test_all_steps_are_named_and_no_colour_is_a_power_of_ten():
    figure = Figure(layout="constrained")
    above, below = figure.subplots(2)
    layer_profile(depth(30), ax=above)
    layer_heatmap(depth(30), ax=below)
    figure.canvas.draw()
    legend = [text.get_text() for text in above.get_legend().get_texts()]
    assert legend == ["step 1", "step 5", "step 9"]
    for limits in (None, (1, 400)):
        if limits:
            below.collections[0].set_clim(*limits)
            figure.canvas.draw()
        bar = [text.get_text() for text in figure.axes[-1].get_yticklabels(which="both")]
        assert {"5", "10", "100"} <= set(bar)
        assert not any("$" in text for text in bar)
