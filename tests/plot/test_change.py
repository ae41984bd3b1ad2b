"""Change since the first measurement: which values are drawn, in colours that are symmetric about no change."""

from __future__ import annotations

import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from matent_callbacks.plot import layer_heatmap, layer_profile

mpl.use("agg")
NAMES = [*(f"layer_{i:02d}" for i in range(30)), "last"]


def log(metric="effective_rank", factor=1.3):
    """Thirty-one layers: the last one goes up by the factor, the middle one down by half as much, the others stay."""
    ends = {"last": factor, "layer_15": 1 - (factor - 1) / 2}
    return [
        {"step": step, **{f"{metric}/{n}": (80.0 + i) * ends.get(n, 1.0) ** (step / 9) for i, n in enumerate(NAMES)}}
        for step in (0, 3, 6, 9)
    ]


def drawn(records, metric="effective_rank", size=(7, 4)):
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    layer_heatmap(records, metric, ax=ax, change=True)
    figure.canvas.draw()
    return ax, ax.collections[0], figure.axes[-1]


def test_of_ranks_ratios_are_drawn_and_no_change_is_grey():
    ax, cells, bar = drawn(log())
    values = np.asarray(cells.get_array())
    assert values.shape == (31, 4)
    np.testing.assert_allclose(values[-1], [math.log(1.3) * s / 9 for s in (0, 3, 6, 9)], atol=1e-12)
    np.testing.assert_allclose(values[15, -1], math.log(0.85))
    np.testing.assert_allclose(values[:15], 0, atol=1e-12)
    assert cells.get_clim() == pytest.approx((-math.log(1.3), math.log(1.3)))
    red, green, blue, _ = cells.to_rgba(0.0)
    assert red == pytest.approx(green, abs=0.01) == pytest.approx(blue, abs=0.01)
    less, more = cells.to_rgba(math.log(0.85)), cells.to_rgba(math.log(1.3))
    assert less[2] > less[0]
    assert more[0] > more[2]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0.833", "0.909", "1", "1.1", "1.2"]
    assert bar.get_ylabel() == "effective rank, times its first value"
    assert ax.get_title() == "Effective rank: change since the first measurement"


def test_of_other_metrics_differences_are_drawn():
    _, cells, bar = drawn(log("matrix_entropy"), "matrix_entropy")
    np.testing.assert_allclose(np.asarray(cells.get_array())[-1, -1], 110.0 * 0.3)
    ticks = [text.get_text() for text in bar.get_yticklabels()]
    assert ticks == ["-30", "-15", "0", "+15", "+30"]
    assert bar.get_ylabel() == "change of matrix entropy (nats)"


@pytest.mark.parametrize("factor", [1.0, 1.0004, 1.003, 1.04, 1.9, 30.0, 1e7])
def test_ticks_are_few_symmetric_and_within_the_bar(factor):
    ax, cells, bar = drawn([{"step": s, "effective_rank/a": 3.0 * factor**s} for s in (0, 1)])
    low, high = bar.get_ylim()
    ticks = [t for t in bar.get_yticks() if low <= t <= high]
    assert 1 <= len(ticks) == len(bar.get_yticks()) <= 5
    np.testing.assert_allclose(ticks, -np.array(ticks[::-1]), atol=1e-12)
    labels = [text.get_text() for text in bar.get_yticklabels(which="both")]
    assert "1" in labels
    assert len(set(labels)) == len(labels)
    assert not any("$" in label for label in labels)
    assert ax.get_title()
    assert np.isfinite(cells.get_clim()).all()


def test_a_layer_changes_from_its_own_first_value():
    nan = math.nan
    rows = {"a": [nan, 2.0, 4.0], "b": [0.0, 5.0, 5.0], "c": [3.0, math.inf, 0.0]}
    records = [{"step": s, **{f"effective_rank/{n}": v[s] for n, v in rows.items()}} for s in range(3)]
    _, cells, _ = drawn(records)
    values = np.ma.filled(cells.get_array(), nan)
    np.testing.assert_allclose(values, [[nan, 0, math.log(2)], [nan, 0, 0], [0, nan, nan]], atol=1e-12)


@pytest.mark.parametrize("size", [(7, 4), (4.2, 6.5), (3.5, 3)])
def test_labels_of_thirty_one_layers_do_not_touch(size):
    ax, _, bar = drawn(log(), size=size)
    for axis, least in ((ax, 5), (bar, 3)):
        boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
        assert len(boxes) >= least
        assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert ax.get_yticklabels()[-1].get_text() == "last"


@pytest.mark.parametrize("width", [7, 4.2])
def test_a_metric_that_the_catalogue_does_not_know_by_depth(width):
    figure = Figure(figsize=(width, 4), layout="constrained")
    ax = figure.add_subplot()
    layer_profile(log("own_quantity"), "own_quantity", ax=ax)
    figure.canvas.draw()
    assert (ax.get_title(), ax.get_ylabel()) == ("Own quantity by depth", "own quantity")
    labels = ax.get_xticklabels()
    assert [labels[0].get_text(), labels[-1].get_text()] == ["layer_00", "last"]
    # They are slanted: between two there has to be room for the height of a line, seen at that angle.
    height = labels[0].get_fontproperties().get_size_in_points() / 72 * figure.dpi
    places = ax.transData.transform([(at, 0) for at in ax.get_xticks()])[:, 0]
    assert all(np.diff(places) * math.sin(math.radians(45)) > height)
    legend, axes = ax.get_legend(), ax.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == ["step 0", "step 3", "step 6", "step 9"]
    assert legend.get_window_extent().x0 >= axes.x1
