"""The picture shows the points, their intervals, the curve and its band."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from matent_callbacks.plot import scaling_law
from matent_callbacks.scaling_law import fit_power_laws

mpl.use("agg")
X, Y = [1e5, 4e5, 2e6, 6e6], [0.8, 0.71, 0.6, 0.55]


def test_points_curve_and_band():
    fit = fit_power_laws(X, Y)[0]
    intervals = [(value - 0.02, value + 0.01) for value in Y]
    names = ["a", r"$\nothing$", "c", "d"]
    (ax,) = scaling_law(X, Y, fit=fit, intervals=intervals, names=names, metric="sequence_matrix_entropy").axes
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "parameters", "matrix entropy (nats)")
    assert [text.get_text() for text in ax.texts] == names
    points, _, (bars,) = ax.containers[0]
    assert points.get_ydata().tolist() == Y
    assert np.allclose([bar[:, 1] for bar in bars.get_segments()], intervals)
    curve = next(line for line in ax.get_lines() if len(line.get_xdata()) == 100)
    assert np.allclose(curve.get_ydata(), [fit(size) for size in curve.get_xdata()])
    assert ax.get_legend().get_texts()[0].get_text() == f"{fit.a.value:.3g} N^-{fit.b.value:.3g}"
    ax.figure.canvas.draw()  # raises if a name is read as a formula


def test_names_stay_in_the_frame():
    names = ["a-model-with-a-name-of-ordinary-length"] * 3 + ["n" * 200]
    (ax,) = scaling_law(X, Y, names=names).axes
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    for text in ax.texts:
        assert frame.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= frame.x1


def test_names_of_neighbours_do_not_touch():
    x, y = [1e5, 2.1e5, 3.9e5, 7.9e5, 1.6e6, 3.3e6, 5.8e6], [0.536, 0.556, 0.567, 0.556, 0.514, 0.45, 0.428]
    (ax,) = scaling_law(x, y, names=[f"llama-{n}x5" for n in range(100, 107)]).axes
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    places = ax.transData.transform(list(zip(x, y, strict=True)))
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_points_alone():
    (ax,) = scaling_law(X, Y, size="steps").axes
    assert ax.get_xlabel() == "steps"
    assert ax.get_ylabel() == "matrix entropy / log d"
    assert all(len(line.get_xdata()) == len(X) for line in ax.get_lines())


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="`x` must hold at least one size"):
        scaling_law([], [])
