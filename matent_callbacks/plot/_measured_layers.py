"""Draws what ``matent measure`` found in each layer: models by depth, and below their differences from a baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matent_callbacks.plot._style import BLUE, FIVE, LOGARITHMIC, ORANGE, UNITS, in_order, layer_ticks, rank_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAN = float("nan")
_COLOURS = (BLUE, ORANGE, *FIVE[3:], FIVE[1], FIVE[2])
_OF_BASELINE = "#777777"
_LABELS = 16  # on the axis of the layers
_MARKERS = "osD^v<>"


def measured_layers(
    models: Sequence[Mapping[str, Any]], metrics: Sequence[str] = ("sequence_effective_rank",)
) -> Figure:
    """Draw measured models by depth, a column for each metric, and under it the differences from the baseline.

    A difference has the 95 % interval of that layer alone, and is hollow where 0 is in it. Where no model was compared
    with a baseline, only the upper row is drawn.

    Args:
        models: The ``"models"`` of a file that ``matent measure --out`` wrote.
        metrics: Names of quantities in it.

    Returns:
        The figure; ``figure.savefig("layers.png")`` writes it.

    Raises:
        ValueError: If no model has one of the metrics.

    Example:
        >>> from matent_callbacks.plot import measured_layers
        >>> layers = {"layer_00": {"rankme": {"value": 3.0}}, "last": {"rankme": {"value": 2.0}}}
        >>> ax = measured_layers([{"model": "runs/a", "layers": layers}], ["rankme"]).axes[0]
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['0', 'last']
    """
    import matplotlib.pyplot as plt

    for metric in metrics:
        if not any(metric in quantities for model in models for quantities in model["layers"].values()):
            raise ValueError(f"`models` must hold values of {metric!r}, and none was found.")
    layers = in_order({layer: None for model in models for layer in model["layers"]})
    compared = [model for model in models if "baseline" in model]
    baseline = str(compared[0]["baseline"]) if compared else ""
    names = _short([model["model"] for model in models])
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(name for name in names if name != baseline)}
    colours[baseline] = _OF_BASELINE
    rows = 2 if compared else 1
    width = max(4.6, 1.6 + 0.17 * len(layers))
    figure, axes = plt.subplots(
        rows, len(metrics), figsize=(width * len(metrics), 3.3 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for metric, ax in zip(metrics, axes[0], strict=True):
        for model in models:
            name = model["model"]
            values = [_number(model["layers"].get(layer, {}).get(metric), "value") for layer in layers]
            style = {"linewidth": 2.4} if name == baseline else {"linewidth": 1.4, "marker": "o", "markersize": 3.5}
            label = names[name] + (" (baseline)" if name == baseline else "")
            ax.plot(range(len(layers)), values, color=colours[name], label=label, **style)
        if metric in LOGARITHMIC:
            rank_scale(ax)
        ax.set_title(metric)
        ax.set_ylabel(UNITS.get(metric, metric.replace("_", " ")))
        layer_ticks(ax.xaxis, [re.sub(r"^layer_0*(?=\d)", "", layer) for layer in layers], _LABELS)
    legend = axes[0][0].legend(frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    for metric, ax in zip(metrics, axes[1] if compared else (), strict=False):
        _draw_differences(ax, compared, metric, layers, colours)
        ax.set_ylabel(f"minus {names[baseline]}", parse_math=False)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    return figure


def _draw_differences(
    ax: Axes, models: Sequence[Mapping[str, Any]], metric: str, layers: list[str], colours: Mapping[str, str]
) -> None:
    ax.axhline(0, color=_OF_BASELINE, linewidth=1)
    for index, model in enumerate(models):
        colour, marker = colours[model["model"]], _MARKERS[index % len(_MARKERS)]
        # Models stand side by side within the place of a layer.
        shift = (index - (len(models) - 1) / 2) * 0.7 / len(models)
        for place, layer in enumerate(layers):
            found = model["layers"].get(layer, {}).get(metric, {}).get("baseline_difference")
            if found is None:
                continue
            value, low, high = (_number(found, end) for end in ("value", "low", "high"))
            is_sure = low > 0 or high < 0
            ax.plot([place + shift] * 2, [low, high], color=colour, linewidth=1.3)
            fill = colour if is_sure else "white"
            ax.plot(place + shift, value, marker, color=colour, markerfacecolor=fill, markersize=4)
    ax.set_title("bars: 95 % for each layer; hollow: 0 is within", fontsize="small", loc="left")


def _number(quantity: Mapping[str, Any] | None, end: str) -> float:
    value = quantity.get(end) if quantity else None
    return _NAN if value is None else float(value)


def _short(names: Sequence[str]) -> dict[str, str]:
    """Return the last part of each path, or the whole where that would name two models."""
    parts = {name: name.rstrip("/").rsplit("/", 1)[-1] for name in names}
    return parts if len(set(parts.values())) == len(parts) else {name: name for name in names}
