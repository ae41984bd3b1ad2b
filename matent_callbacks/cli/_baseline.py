"""Compares models with a baseline that was measured on the same documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from matent_callbacks.cli._entries import interval
from matent_callbacks.cli._results import decoded, encoded
from matent_callbacks.cli._state import Floats

Samples = Mapping[str, Mapping[str, Floats]]
"""By layer and name: what :func:`.layer_samples` returned."""


def kept(entry: Mapping[str, Any], samples: Samples, checksum: int) -> dict[str, Any]:
    """Return what has to be kept of the baseline to compare others with it, as JSON.

    The resamples are rounded to float32, as :func:`compare` rounds those of the others; the values are in the entry.
    """
    layers = {
        layer: {name: encoded(values.astype(np.float32)) for name, values in quantities.items()}
        for layer, quantities in samples.items()
    }
    return {"model": entry["model"], "checksum_of_tokens": checksum, "layers": layers}


def compare(
    entry: dict[str, Any], samples: Samples, checksum: int, *, baseline: Mapping[str, Any], before: Mapping[str, Any]
) -> list[str]:
    """Add ``baseline_difference`` to each quantity of a model: its value minus that of the baseline, with interval.

    The resamples of both are paired: the same draws of the same documents.

    Args:
        entry: Of the model, in the results; it is changed.
        samples: Of the model.
        checksum: Of the documents and tokens that it was given.
        baseline: The entry of the baseline.
        before: What :func:`kept` returned of the baseline.

    Returns:
        What limits the comparison, as sentences.
    """
    entry["baseline"] = baseline["model"]
    own, others = entry["layers"], baseline["layers"]
    common = [layer for layer in own if layer in others]
    for layer in common:
        for name in own[layer].keys() & others[layer].keys():
            value, of_baseline = own[layer][name]["value"], others[layer][name]["value"]
            difference = np.nan if value is None or of_baseline is None else value - of_baseline
            pair = samples[layer][name][1:].astype(np.float32), decoded(before["layers"][layer][name])[1:]
            spread = pair[0] - pair[1] if len(pair[0]) == len(pair[1]) else np.empty(0)
            own[layer][name]["baseline_difference"] = interval(np.array([difference, *spread]))
    return _limits(entry, baseline, common, same_tokens=checksum == before["checksum_of_tokens"])


def _limits(
    entry: Mapping[str, Any], baseline: Mapping[str, Any], common: list[str], *, same_tokens: bool
) -> list[str]:
    name, base = entry["model"], baseline["model"]
    sentences = []
    if not same_tokens:
        given = [f"{of['num_sequences']:,} documents and {of['num_tokens']:,} tokens" for of in (entry, baseline)]
        sentences.append(
            f"{name} was not given the tokens that its baseline {base} was given ({given[0]}; {given[1]}): another "
            "tokenizer, maximal length, or documents left out. The differences show that as well."
        )
    if not common:
        sentences.append(f"{name} and its baseline {base} have no layer in common, so there are no differences.")
    elif entry["layers"].keys() != baseline["layers"].keys():
        sentences.append(
            f"{name} was measured at {len(entry['layers'])} layers and its baseline {base} at "
            f"{len(baseline['layers'])}: there are differences for the {len(common)} that both have."
        )
    if entry["hidden_size"] != baseline["hidden_size"]:
        sentences.append(
            f"{name} has width {entry['hidden_size']} and its baseline {base} {baseline['hidden_size']}: "
            "a wider model can have higher ranks."
        )
    return sentences
