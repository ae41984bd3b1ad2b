"""Computes the readings of all layers: distributes them over the ranks and decomposes their matrices in batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.catalogue import CATALOGUE, ENTROPIES, ENTROPY_ERROR, METRICS, Solver, Source, quantity
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.reduction import is_distributed
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.monitor.comparison import Comparison
from matent_callbacks.monitor.decomposition import (
    COUNTED,
    NONFINITE,
    WIDE,
    Unit,
    decompose,
    estimated_sources,
    spectrum_names,
)
from matent_callbacks.monitor.over_ranks import gather, gather_over_ranks
from matent_callbacks.monitor.recording import part

# The mean entropy of sequences, which is subtracted to get the Holevo information, and is not logged.
_WITHIN = "entropy_within_sequences"
# The source of what compares with a reference.
_REFERENCE = "reference"


class Readings(NamedTuple):
    """The numbers of all layers."""

    values: dict[str, dict[str, float]]
    """By layer and name. A number that is not defined, because no token was seen for example, is NaN."""
    nonfinite: dict[str, int]
    """Tokens that were left out because of NaN or Inf, by layer."""
    failed: set[str]
    """Layers that were left out: on all ranks, because some rank could not read them."""
    given: dict[str, int]
    """Tokens that the masks have in, whether they hold NaN or not, by layer; without sinks that are left out."""
    sinks: dict[str, tuple[int, float]]
    """Sinks that were left out, and how many times as long as other tokens (geometric mean), by layer with any."""
    counted: dict[tuple[str, Source], int]
    """What counted, by layer and source: tokens, or sequences."""
    estimated: set[str]
    """Layers of which numbers were estimated."""
    slow: set[tuple[str, str]]
    """Layers of which all eigenvalues were computed though that takes long, and the metrics that need them."""
    unlike: str = ""
    """How ranks differ in what they read, so that nothing could be computed."""


class PendingReadings:
    """Computes the readings of all layers in two steps: the constructor collects statistics, :meth:`result` decomposes.

    In a distributed run the ranks first check that they read the same layers; if not, none of them computes anything.
    Then the constructor reduces the moments of each layer to one rank. In :meth:`result` each rank decomposes its
    layers, and the numbers are sent to all ranks. Every rank makes the same collective calls in both steps, whatever
    its layers have seen.

    Args:
        accumulators: The statistics of each layer, by its key.
        metrics: Names of the catalogue.
        failed: Keys of layers that this rank could not read.
        executor: If given, it decomposes copies of the matrices on the CPU, and :meth:`result` waits for it.
        solver: How matrices are decomposed.
        local: Use the statistics of this rank alone, without any collective call.
        group: The ranks whose tokens belong together; ``None``: all.
        comparison: What is compared with a reference.
    """

    def __init__(
        self,
        accumulators: Mapping[str, LayerAccumulator],
        metrics: Sequence[str],
        *,
        failed: Collection[str] = (),
        executor: Executor | None = None,
        solver: Solver = "exact",
        local: bool = False,
        group: dist.ProcessGroup | None = None,
        comparison: Comparison | None = None,
    ) -> None:
        self._device = next(iter(accumulators.values())).device
        compared = comparison.layers if comparison is not None else ()
        self._distributed = is_distributed(group) and not local
        self._group = group
        self._error: Exception | None = None
        room = None
        if self._distributed:
            try:
                room = None if comparison is None else comparison.room(self._device)
            except Exception as error:
                self._error, failed = error, {*failed, *compared}
            settings = {"metrics": metrics, "solver": solver, "compared": compared}
            gathered = gather_over_ranks(accumulators, failed, settings, group)
        else:
            gathered = gather(accumulators, failed)
        if comparison is not None and not gathered.unlike:
            kept = {layer: own.probe_tokens for layer, own in accumulators.items() if own.probe_tokens is not None}
            dtype = next(iter(accumulators.values())).dtype
            try:
                pairs = comparison.pairs(kept, gathered.failed, self._device, dtype, room)
                gathered.matrices.update({(_REFERENCE, layer): pair for layer, pair in pairs.items()})
            except Exception as error:
                if not self._distributed:
                    raise
                self._error = self._error or error  # raised on all ranks by `result`
        estimated = frozenset[Source]() if solver == "exact" else estimated_sources(metrics)
        self._decompose = partial(decompose, estimated=estimated)
        self._names = {
            unit: _names(unit[0], metrics, width, estimated=unit[0] in estimated)
            for unit, width in gathered.widths.items()
        }
        for layer in compared:
            if comparison is not None and layer not in gathered.failed:
                self._names[_REFERENCE, layer] = _names(_REFERENCE, comparison.metrics)
        # Those of metrics that no estimate serves.
        self._slow = [
            (layer, name, source)
            for (source, layer), width in gathered.widths.items()
            for name in metrics
            if solver != "exact" and width >= WIDE
            if CATALOGUE[name].source == source and CATALOGUE[name].solver == "eigenvalues"
        ]
        self._mean_names = {unit: _names(unit[0], metrics) for unit in gathered.means}
        self._gathered = gathered
        self._given = {layer: accumulator.num_given for layer, accumulator in accumulators.items()}
        self._sinks = {layer: accumulator.sinks for layer, accumulator in accumulators.items()}
        self._found: Future[dict[Unit, Tensor]] | None = None
        if executor is not None:
            matrices = {unit: matrix.to(torch.device("cpu")) for unit, matrix in gathered.matrices.items()}
            self._gathered = gathered._replace(matrices={})
            self._found = executor.submit(self._decompose, matrices, self._names)

    def result(self) -> Readings:
        """Return the numbers, which are bitwise the same on every rank."""
        if self._gathered.unlike:
            return Readings({}, {}, self._gathered.failed, {}, {}, {}, set(), set(), self._gathered.unlike)
        found, error = self._decomposed()
        pieces = [self._piece(found.get(unit), len(names)) for unit, names in self._names.items()]
        own_means = not self._distributed or dist.get_rank(self._group) == 0
        for unit, names in self._mean_names.items():
            numbers_of_mean = _mean_numbers(self._gathered.means[unit], names) if own_means else None
            pieces.append(self._piece(numbers_of_mean, len(names)))
        pieces.append(self._piece(torch.stack([*self._given.values()]), len(self._given)))
        pieces.append(self._piece(torch.cat([*self._sinks.values()]), 2 * len(self._sinks)))
        pieces.append(self._piece(None, 1) + float(error is not None))
        table = torch.cat(pieces)
        if self._distributed:
            dist.all_reduce(table, group=self._group)
        with part("wait"):
            *numbers, num_failed = table.tolist()
        if num_failed:
            raise RuntimeError(f"The decomposition failed on {int(num_failed)} rank(s).") from error
        return self._read_back(numbers)

    def _decomposed(self) -> tuple[dict[Unit, Tensor], Exception | None]:
        """Return the numbers of this rank. In a distributed run an error is returned: the others wait for this rank."""
        if self._error is not None:
            error, self._error = self._error, None
            return {}, error
        try:
            found = self._found.result() if self._found else self._decompose(self._gathered.matrices, self._names)
        except Exception as error:
            # The traceback refers to this object. If this object referred to the error in turn, through the future, the
            # matrices would stay in memory until the garbage collector runs.
            self._found, self._gathered = None, self._gathered._replace(matrices={})
            if not self._distributed:
                raise
            return {}, error
        return found, None

    def _piece(self, numbers: Tensor | None, length: int) -> Tensor:
        # MPS has no float64.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        if numbers is None:
            return torch.zeros(length, dtype=dtype, device=self._device)
        return numbers.to(self._device, dtype)

    def _read_back(self, numbers: list[float]) -> Readings:
        both = (*self._names.items(), *self._mean_names.items())
        columns = [(source, layer, name) for (source, layer), names in both for name in names]
        of_layers = numbers[len(columns) :]
        given = {layer: int(number) for layer, number in zip(self._given, of_layers, strict=False)}
        pairs = zip(of_layers[len(given) :: 2], of_layers[len(given) + 1 :: 2], strict=True)
        sinks = {
            layer: (int(number), math.exp(logs / number))
            for layer, (number, logs) in zip(self._sinks, pairs, strict=True)
            if number
        }
        readings = Readings({}, {}, self._gathered.failed, given, sinks, {}, set(), set())
        for (source, layer, name), number in zip(columns, numbers[: len(columns)], strict=True):
            values = readings.values.setdefault(layer, {})
            if name == NONFINITE:
                # A source of one vector per sequence may leave out fewer tokens than one of all tokens.
                readings.nonfinite[layer] = max(int(number), readings.nonfinite.get(layer, 0))
            elif name == COUNTED:
                readings.counted[layer, source] = int(number)
            elif not name.endswith(ENTROPY_ERROR):
                values[name] = number if math.isfinite(number) else math.nan
            elif not math.isnan(number):  # as that of what was not estimated
                readings.estimated.add(layer)
                if any(quantity(own) in ENTROPIES for own in self._names[source, layer]):
                    values[name] = number
        readings.slow.update(
            (layer, name) for layer, name, source in self._slow if readings.counted[layer, source] >= WIDE
        )
        for values in readings.values.values():
            if _WITHIN in values:
                difference = values.get("holevo_information", math.nan) - values.pop(_WITHIN)
                values["holevo_information"] = 0.0 if difference < 0 else difference  # only rounding is negative
        return readings


def _error(source: Source) -> str:
    return ENTROPY_ERROR if source == "pooled" else f"{source}_{ENTROPY_ERROR}"


def _names(source: Source, metrics: Sequence[str], num_features: int = 0, *, estimated: bool = False) -> list[str]:
    """Return the names of the numbers of one source of a layer, in the order in which ranks exchange them."""
    names = [name for name in metrics if METRICS[name].source == source and name != "spectrum"]
    if source == "sequence_by_tokens":
        names.append(_WITHIN)
    if "spectrum" in metrics and CATALOGUE["spectrum"].source == source and num_features:
        names += spectrum_names(num_features, estimated=estimated)
    return [*names, *([_error(source)] if estimated else []), COUNTED, NONFINITE]


def _mean_numbers(mean: SequenceMean, names: Sequence[str]) -> Tensor:
    value = torch.where(mean.num_sequences > 0, mean.mean, torch.nan)
    counts = {COUNTED: mean.num_sequences, NONFINITE: mean.num_nonfinite}
    numbers = [
        counts[name].to(value.dtype)
        if name in counts
        else value
        if name == _WITHIN
        else CATALOGUE[name].of_mean(value, mean.num_sequences)
        for name in names
    ]
    return torch.stack(numbers)
