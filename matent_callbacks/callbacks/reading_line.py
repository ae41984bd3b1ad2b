"""Sums up a log record, which may hold a reading of many layers, in one short line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matent_callbacks.callbacks.alignment_reading import TOWERS
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.plot._style import in_order


def reading_line(step: int, record: Mapping[str, Any], metric: str) -> str | None:
    """Format the step, the losses, and the metric in the first, the middle and the last layer, by their logged names.

    ``None`` if the record holds none of these.
    """
    losses = [f"{key} {record[key]:.4g}" for key in record if key == "loss" or _is_held_out_loss(key)]
    layers: dict[str, list[str]] = {}
    for key in record:
        prefix, found, layer = key.partition(f"{metric}/")
        # Also that of an evaluation or of a probe with a name, but no metric that merely ends like this one.
        if found and (prefix in ("", "eval_") or prefix.endswith("/")) and layer not in (*STAGES, *TOWERS):
            layers.setdefault(prefix, []).append(layer)
    readings = []
    for prefix, names in layers.items():
        ordered = in_order(names)
        chosen = dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        values = ", ".join(f"{name} {record[f'{prefix}{metric}/{name}']:.3g}" for name in chosen)
        readings.append(f"{prefix}{metric}: {values}")
    return "  ".join([f"step {step:5}", *losses, *readings]) if losses or readings else None


def _is_held_out_loss(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_loss") and "/" not in key
