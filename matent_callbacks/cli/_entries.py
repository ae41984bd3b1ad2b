"""Turns the statistics of a model into its entry in the results, and prints the table of all entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text as Cell

from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.cli._bootstrap import LEVEL, interval
from matent_callbacks.cli._state import State
from matent_callbacks.monitor.readings import PendingReadings

TROUBLE = {
    "empty": "documents are empty",
    "one_token": "documents have fewer than two tokens and so no covariance",
    "damaged": "lines are not JSON with a string in that field",
    "not_utf8": "lines are not UTF-8 text",
    "unreadable": "files cannot be read",
    "nonfinite": "sequences gave NaN or Inf",
}
_HEADS = {
    "sequence_matrix_entropy": "entropy (nats)",
    "normalized_sequence_matrix_entropy": "/ log d",
    "sequence_effective_rank": "eRank",
    "untrained_sequence_matrix_entropy": "untrained entropy",
    "untrained_sequence_effective_rank": "untrained eRank",
    "diff_erank": "Diff-eRank",
}


def layer_quantities(trained: State, untrained: State | None, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compute the paper's data-set quantities of each layer, and the other metrics that were asked for."""
    further = _further(trained, metrics)
    quantities: dict[str, dict[str, Any]] = {}
    for layer in trained.widths:
        means = trained.means.get(layer)
        if means is None:  # its output is one vector per sequence
            quantities[layer] = further.get(layer, {})
            continue
        entropy, count = means.replicates(), means.count
        found = {
            "sequence_matrix_entropy": entropy,
            "normalized_sequence_matrix_entropy": entropy / math.log(trained.widths[layer])
            if trained.widths[layer] > 1
            else np.full_like(entropy, np.nan),
            "sequence_effective_rank": np.exp(entropy),
        }
        if untrained is not None:
            before = untrained.means[layer].replicates()
            found["untrained_sequence_matrix_entropy"] = before
            found["untrained_sequence_effective_rank"] = np.exp(before)
            # Replicate by replicate: both models saw the same draws.
            found["diff_erank"] = np.exp(before) - np.exp(entropy)
        own = {name: interval(replicates, count=count) for name, replicates in found.items()}
        quantities[layer] = {**own, **further.get(layer, {})}
    return quantities


def _further(state: State, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    names = [name for name in metrics if CATALOGUE[name].source != "sequence"]
    if not names or not state.widths:
        return {}
    accumulators = {}
    for layer in state.widths:
        moments, others = state.moments.get(layer, {}), state.others.get(layer, {})
        sources = frozenset((*moments, *others))
        accumulators[layer] = LayerAccumulator(
            sources, max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
        )
        accumulators[layer].merge({**moments, **others})
    # All ranks' moments are here already.
    readings = PendingReadings(accumulators, names, local=True).result()
    # One name may stand for several numbers.
    given = [name for name in names if name != "spectrum"]
    return {
        layer: {
            name: {"value": values.get(name), "low": None, "high": None} for name in dict.fromkeys([*given, *values])
        }
        for layer, values in readings.values.items()
    }


def notes(state: State) -> list[str]:
    """One sentence for each kind of document that was left out."""
    return [
        f"{count:,} {TROUBLE[kind]} and are left out (first: {state.places[kind]})."
        for kind, count in sorted(state.skipped.items())
    ]


def table(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each model and layer."""
    names = list(dict.fromkeys(name for entry in models for layer in entry["layers"].values() for name in layer))
    made = Table(caption=f"below each value: its {LEVEL:.0%} bootstrap interval over sequences", caption_justify="left")
    for head in ("model", "layer"):
        made.add_column(head, overflow="fold")
    for head in ("parameters", "sequences", *(_HEADS.get(name, name.replace("_", " ")) for name in names)):
        made.add_column(head, justify="right")
    for entry in models:
        about = [entry["model"], f"{entry['parameters']:,}", f"{entry['num_sequences']:,}"]
        for layer, quantities in entry["layers"].items():
            cells = [about[0], layer, *about[1:], *(_cell(quantities.get(name)) for name in names)]
            # As text, so that a name is shown as it is: rich would interpret markup in it.
            made.add_row(*map(Cell, cells))
            about = [""] * 3
        made.add_section()
    return made


def _cell(quantity: Mapping[str, float | None] | None) -> str:
    if quantity is None or quantity["value"] is None:
        return "-"
    if quantity["low"] is None:
        return f"{quantity['value']:.4g}"
    return f"{quantity['value']:.4g}\n{quantity['low']:.4g} to {quantity['high']:.4g}"
