"""What ``matent measure`` shows: sentences on stderr, tables, and the picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as Cell

from matent_callbacks.cli._entries import GROUPS, LEVEL
from matent_callbacks.cli._state import State
from matent_callbacks.monitor.explanations import left_out_sinks

_TROUBLE = {
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


def say(message: str) -> None:
    """Print one sentence on stderr."""
    print(f"matent: {message}", file=sys.stderr, flush=True)


def notes(state: State) -> list[str]:
    """One sentence for each kind of document that was left out."""
    return [
        f"{count:,} {_TROUBLE[kind]} and are left out (first: {state.places[kind]})."
        for kind, count in sorted(state.skipped.items())
    ]


def about_sinks(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in which layers sinks were left out: one sentence for all models in which these are the same."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entry in models:
        # Results of earlier releases know of none.
        if sinks := entry.get("left_out_sinks"):
            alike.setdefault(tuple(layer for layer in entry["layers"] if layer in sinks), []).append(entry)
    return [
        f"{', '.join(entry['model'] for entry in entries)}: "
        + left_out_sinks(
            layers,
            list(entries[0]["layers"]),
            [of["times_as_long"] for entry in entries for of in entry["left_out_sinks"].values()],
            switch="--include-sinks",
        )
        for layers, entries in alike.items()
    ]


def print_tables(models: list[dict[str, Any]]) -> None:
    """Print what was measured, and the differences from the baseline if there is one."""
    # Without a terminal there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(_table(models))
    if any("baseline" in entry for entry in models):
        console.print(_differences(models))


def draw(models: list[dict[str, Any]], metrics: list[str], path: Path) -> int:
    """Draw the effective rank of sequences and the metrics that each layer has one number of; returns the exit code."""
    from matent_callbacks.plot import measured_layers

    there = {name for entry in models for quantities in entry["layers"].values() for name in quantities}
    names = [name for name in dict.fromkeys(("sequence_effective_rank", *metrics)) if name in there]
    try:
        measured_layers(models, names).savefig(path, dpi=130)
    except OSError as error:
        say(f"--plot {path} cannot be written ({error.strerror}).")
        return 1
    say(f"picture: {path}")
    return 0


def _table(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each model and layer."""
    names = _names(models)
    quantities = [of.get(name) for entry in models for of in entry["layers"].values() for name in names]
    has_intervals = any(of is not None and of["low"] is not None for of in quantities)
    caption = f"below each value: its {LEVEL:.0%} bootstrap interval over sequences" if has_intervals else None
    made = Table(caption=caption, caption_justify="left")
    for head in ("model", "layer"):
        made.add_column(head, overflow="fold")
    for head in ("parameters", "sequences", *names.values()):
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


def _differences(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each layer of each model that was compared with the baseline."""
    compared = [entry for entry in models if "baseline" in entry]
    names = _names(compared)
    differences = [
        of["baseline_difference"]
        for entry in compared
        for quantities in entry["layers"].values()
        for of in quantities.values()
        if "baseline_difference" in of
    ]
    made = Table(
        title=Cell(f"minus {compared[0]['baseline']}, the baseline, on the same documents"),
        title_justify="left",
        caption=f"below each difference: its {LEVEL:.0%} interval, of the paired bootstrap over sequences; of the "
        f"jackknife over {GROUPS} groups of documents for what is pooled; * where 0 is not in it"
        if any(own["low"] is not None for own in differences)
        else None,
        caption_justify="left",
    )
    for head in ("model", "layer"):
        made.add_column(head, overflow="fold")
    for head in names.values():
        made.add_column(head, justify="right")
    for entry in compared:
        name = entry["model"]
        for layer, quantities in entry["layers"].items():
            found = {key: of["baseline_difference"] for key, of in quantities.items() if "baseline_difference" in of}
            if found:
                made.add_row(*map(Cell, [name, layer, *(_cell(found.get(key), is_difference=True) for key in names)]))
                name = ""
        made.add_section()
    return made


def _names(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the quantities of all models and layers with their headings."""
    found = dict.fromkeys(name for entry in models for layer in entry["layers"].values() for name in layer)
    return {name: _HEADS.get(name, name.replace("_", " ")) for name in found}


def _cell(quantity: Mapping[str, float | None] | None, *, is_difference: bool = False) -> str:
    if quantity is None or quantity["value"] is None:
        return "-"
    shown = "{:+.3g}" if is_difference else "{:.4g}"
    value, low, high = quantity["value"], quantity["low"], quantity["high"]
    if low is None or high is None:
        return shown.format(value)
    mark = "*" if is_difference and (low > 0 or high < 0) else ""
    return f"{shown.format(value)}{mark}\n{shown.format(low)} to {shown.format(high)}"
