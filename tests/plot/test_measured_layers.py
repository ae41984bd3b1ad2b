"""The picture of measured layers shows each model by depth, and the differences with their intervals."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from matent_callbacks.plot import measured_layers

mpl.use("agg")
DEPTH = 31
LAYERS = [*(f"layer_{i:02d}" for i in range(DEPTH - 1)), "last"]


def entry(name: str, values: list[float | None], baseline: str | None = None, shift: float = 0.0) -> dict[str, Any]:
    layers = {}
    for layer, value in zip(LAYERS, values, strict=False):
        quantity: dict[str, Any] = {"value": value, "low": None, "high": None}
        if baseline is not None:
            quantity["baseline_difference"] = {"value": shift, "low": shift - 0.5, "high": shift + 0.5}
        layers[layer] = {"rankme": quantity}
    return {"model": name, "layers": layers, **({"baseline": baseline} if baseline is not None else {})}


def test_models_and_differences():
    base = entry("runs/$base", [float(i + 1) for i in range(DEPTH)])
    tuned = entry("runs/tuned", [float(i + 2) for i in range(DEPTH)], "runs/$base", shift=1.0)
    shallow = entry("runs/shallow", [3.0, None], "runs/$base", shift=0.25)
    figure = measured_layers([base, tuned, shallow], ["rankme"])
    above, below = figure.axes
    lines = above.get_lines()
    assert [line.get_label() for line in lines] == ["$base (baseline)", "tuned", "shallow"]
    assert list(lines[1].get_ydata()) == [float(i + 2) for i in range(DEPTH)]
    assert np.isnan(lines[2].get_ydata()[1:]).all()
    assert above.get_yscale() == "log"
    labels = [label.get_text() for label in below.get_xticklabels()]
    assert labels[:3] == ["0", "2", "4"]
    assert labels[-1] == "last"
    assert below.get_ylabel() == "minus $base"
    points = [line for line in below.get_lines() if len(line.get_ydata()) == 1]
    bars = [list(line.get_ydata()) for line in below.get_lines()[1:] if len(line.get_ydata()) == 2]
    assert bars.count([0.5, 1.5]) == DEPTH
    assert bars.count([-0.25, 0.75]) == 2
    hollow = [line.get_ydata()[0] for line in points if line.get_markerfacecolor() == "white"]
    assert hollow == [0.25, 0.25]
    figure.canvas.draw()  # raises if a name is read as a formula


def test_without_a_baseline_there_is_one_row():
    models = [entry("a/final", [1.0, 2.0]), entry("b/final", [2.0, 3.0])]
    (ax,) = measured_layers(models, ["rankme"]).axes
    assert [line.get_label() for line in ax.get_lines()] == ["a/final", "b/final"]  # one last part for both
    assert ax.get_ylabel() == "RankMe (dimensions)"


def test_a_metric_that_no_model_has():
    with pytest.raises(ValueError, match="values of 'lidar', and none was found"):
        measured_layers([entry("a", [1.0])], ["lidar"])
