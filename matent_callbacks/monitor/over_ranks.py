"""Collects the statistics of all layers: each rank gets those that it decomposes, over the tokens of all ranks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from matent_callbacks.accumulate.documents import Discriminant
from matent_callbacks.accumulate.interface import State, Statistic
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.pooled_tokens import Matrix
from matent_callbacks.accumulate.reduction import (
    agree,
    agreed_failures,
    agreed_widths,
    all_reduce_sequence_means,
    reduce_moments,
)
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.monitor.decomposition import Unit, Work
from matent_callbacks.monitor.explanations import how_ranks_differ


class Gathered(NamedTuple):
    """What one rank computes the readings from."""

    widths: dict[Unit, int]
    """Number of features of every unit that is not left out."""
    matrices: dict[Unit, Work]
    """Those that this rank decomposes."""
    means: dict[Unit, SequenceMean]
    failed: set[str]
    unlike: str = ""


def gather(accumulators: Mapping[str, LayerAccumulator], failed: Collection[str]) -> Gathered:
    """Return what this rank has, whatever other ranks have."""
    statistics = {layer: own.statistics for layer, own in accumulators.items() if layer not in failed}
    matrices = _matrices(statistics)
    widths = {unit: matrix.num_features for unit, matrix in matrices.items()}
    return Gathered(widths, {**matrices}, _means(statistics), set(failed))


def _matrices(statistics: Mapping[str, Sequence[Statistic]]) -> dict[Unit, Matrix | Discriminant]:
    return {
        (source, layer): statistic.matrix(source)
        for layer, own in statistics.items()
        for statistic in own
        for source in statistic.decomposed
    }


def _means(statistics: Mapping[str, Sequence[Statistic]]) -> dict[Unit, SequenceMean]:
    return {
        (source, layer): state
        for layer, own in statistics.items()
        for statistic in own
        if not statistic.tokens()
        for source, state in statistic.states().items()
        if isinstance(state, SequenceMean)
    }


def gather_over_ranks(
    accumulators: Mapping[str, LayerAccumulator],
    failed: Collection[str],
    settings: Mapping[str, Any],
    group: dist.ProcessGroup | None,
) -> Gathered:
    """Reduce the moments of each layer to one rank, and the means to all, or say how the ranks differ.

    Every rank calls it, with ``settings`` that have to be the same.
    """
    first = next(iter(accumulators.values()))
    device = first.device
    described = json.dumps({"layers": list(accumulators), **settings, "dtype": str(first.dtype)})
    agreement = agree(described, any(layer in failed for layer in accumulators), device, group)
    if agreement.descriptions:
        return Gathered({}, {}, {}, set(failed), how_ranks_differ(agreement.descriptions, group))
    everywhere: set[str] = set()
    if agreement.any_failed:
        flags = agreed_failures([layer in failed for layer in accumulators], device, group)
        everywhere = {layer for layer, flag in zip(accumulators, flags, strict=True) if flag}
    used = {layer: accumulator for layer, accumulator in accumulators.items() if layer not in everywhere}
    spectral = [(layer, s) for layer, own in used.items() for s in own.statistics if s.tokens()]
    units, moments, owners = list[Unit](), list[Moments](), list[int]()
    for number, (layer, statistic) in enumerate(spectral):
        for source, tokens in statistic.tokens().items():
            units.append((source, layer))
            moments.append(tokens.moments().to(device))
            owners.append(number % dist.get_world_size(group))
    widths = agreed_widths(moments, device, group)
    everywhere |= {layer for (_, layer), width in zip(units, widths, strict=True) if width is None}
    totals: dict[Unit, State] = {}
    for in_float64 in (False, True):  # what is sent together has one dtype
        own = [i for i, (source, _) in enumerate(units) if STATISTICS[source].in_float64 == in_float64]
        reduced = reduce_moments(
            [moments[i] for i in own], [widths[i] for i in own], owners=[owners[i] for i in own], group=group
        )
        totals.update({units[i]: common for i, common in zip(own, reduced, strict=True) if common is not None})
    # Of those that this rank owns.
    whole: dict[str, list[Statistic]] = {layer: [] for layer in used}
    for layer, statistic in spectral:
        states = {source: totals[source, layer] for source in statistic.tokens() if (source, layer) in totals}
        if states and layer not in everywhere:
            whole[layer].append(type(statistic)(states, statistic.settings))
    means = _means({layer: a.statistics for layer, a in used.items()})
    common_means = all_reduce_sequence_means(list(means.values()), group)
    agreed = {unit: width for unit, width in zip(units, widths, strict=True) if width is not None}
    known = {
        (source, layer): agreed[statistic.sources[0], layer].num_features
        for layer, statistic in spectral
        for source in statistic.decomposed
        if (statistic.sources[0], layer) in agreed
    }
    return Gathered(known, {**_matrices(whole)}, dict(zip(means, common_means, strict=True)), everywhere)
