"""Turns the statistics of a model into the quantities of its layers, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from matent_callbacks.accumulate.catalogue import CATALOGUE, sources_of
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.cli._state import REPLICATES, Floats, State
from matent_callbacks.monitor.readings import PendingReadings

LEVEL = 0.95
GROUPS = 10
"""Of documents, whose moments are kept apart for the intervals of pooled quantities: memory grows with their number,
and so do the decompositions. With ten, Student's quantile is 2.26 instead of 1.96."""


def layer_samples(trained: State, untrained: State | None, metrics: Sequence[str]) -> dict[str, dict[str, Floats]]:
    """Compute the paper's data-set quantities of each layer, and the other metrics that were asked for.

    Returns:
        By layer and name: the value, and that of each resample of the documents: ``(1 + REPLICATES,)`` of the bootstrap
        for means over sequences, ``(1 + GROUPS,)`` of the jackknife for all else, or ``(1,)`` without resamples.
    """
    pooled = _pooled_samples(trained, metrics)
    samples: dict[str, dict[str, Floats]] = {}
    for layer in trained.widths:
        sums = trained.means.get(layer)
        if sums is None:  # its output is one vector per sequence
            samples[layer] = pooled.get(layer, {})
            continue
        entropy = _means(sums)
        found = {
            "sequence_matrix_entropy": entropy,
            "normalized_sequence_matrix_entropy": entropy / math.log(trained.widths[layer])
            if trained.widths[layer] > 1
            else np.full_like(entropy, np.nan),
            "sequence_effective_rank": np.exp(entropy),
        }
        if untrained is not None:
            before = _means(untrained.means[layer])
            found["untrained_sequence_matrix_entropy"] = before
            found["untrained_sequence_effective_rank"] = np.exp(before)
            # Replicate by replicate: both models saw the same draws.
            found["diff_erank"] = np.exp(before) - np.exp(entropy)
        # A single sequence is the same in every replicate.
        last = None if sums[1, 0] > 1 else 1
        samples[layer] = {**{name: values[:last] for name, values in found.items()}, **pooled.get(layer, {})}
    return samples


def _means(sums: Floats) -> Floats:
    """Return the mean, and that of each replicate; NaN for a replicate that drew no sequence."""
    total, weight = sums
    means: Floats = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return means


def interval(samples: Floats) -> dict[str, float | None]:
    """Turn a value and its resamples into the value and the ends of its interval, if there is one.

    Of the bootstrap these are percentiles. Of the jackknife they follow from the variance over groups of documents that
    are left out in turn (Tukey 1958; Efron & Tibshirani 1993, chapter 11) and Student's distribution: a bootstrap of a
    pooled rank would lie too low, since a document that is drawn twice adds no dimensions.
    """
    value, spread = float(samples[0]), samples[1:][np.isfinite(samples[1:])]
    tail = (1 - LEVEL) / 2
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if len(spread) < 2:
        return {"value": value, "low": None, "high": None}
    if len(samples) == 1 + REPLICATES:
        low, high = np.quantile(spread, [tail, 1 - tail])
        return {"value": value, "low": float(low), "high": float(high)}
    from scipy.special import stdtrit

    count = len(spread)
    half = float(stdtrit(count - 1, 1 - tail)) * math.sqrt((count - 1) * float(spread.var()))
    return {"value": value, "low": value - half, "high": value + half}


def _pooled_samples(state: State, metrics: Sequence[str]) -> dict[str, dict[str, Floats]]:
    """Compute what is pooled over all documents, and over all but those of each group if there are several."""
    names = [name for name in metrics if CATALOGUE[name].source != "sequence"]
    if not names or not state.widths:
        return {}
    values = [_pooled_values(state, names, without=None)]
    if len(state.pooled) > 1:
        values += [_pooled_values(state, names, without=g) if g in state.pooled else {} for g in range(GROUPS)]
    return {
        layer: {name: np.array([one.get(layer, {}).get(name, math.nan) for one in values]) for name in of_layer}
        for layer, of_layer in values[0].items()
    }


def _pooled_values(state: State, names: Sequence[str], *, without: int | None) -> dict[str, dict[str, float]]:
    accumulators = {}
    parts = [pooled for group, pooled in state.pooled.items() if group != without]
    for layer in state.widths:
        kept = {s for part in parts for s in (*part.moments.get(layer, {}), *part.means.get(layer, {}))}
        sources = frozenset(source for source in sources_of(names) if kept & {*STATISTICS[source].sources})
        accumulators[layer] = LayerAccumulator(
            sources, max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
        )
        for part in parts:
            accumulators[layer].merge({**part.moments.get(layer, {}), **part.means.get(layer, {})})
    # All ranks' moments are here already.
    readings = PendingReadings(accumulators, names, local=True).result()
    # One name may stand for several numbers.
    given = [name for name in names if name != "spectrum"]
    return {
        layer: {name: values.get(name, math.nan) for name in dict.fromkeys([*given, *values])}
        for layer, values in readings.values.items()
    }
