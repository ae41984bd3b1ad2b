"""What the layers accumulate during one reading, and how all of them become numbers together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks._catalogue import CATALOGUE, Source
from matent_callbacks._distributed import all_reduce_moments, all_reduce_sequence_means, is_distributed
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states, prepare_tokens
from matent_callbacks.functional.entropy import spectral_summary
from matent_callbacks.functional.moments import (
    Center,
    Moments,
    covariance,
    empty_moments,
    merge_moments,
    token_moments,
)
from matent_callbacks.functional.sequences import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    sequence_mean,
)
from matent_callbacks.functional.spectrum import unit_trace_eigenvalues

# Covariances of at most so many numbers are decomposed in one call: batching gains nothing beyond, and their memory
# is taken twice while it lasts.
_BATCH_NUMBERS = 2**25


class LayerAccumulator:
    """The statistics of one layer since the last reading: those that the chosen metrics need."""

    def __init__(
        self, sources: frozenset[Source], *, max_tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.moments: dict[Source, Moments] = {
            source: empty_moments(0, dtype=dtype, device=device) for source in sorted(sources - {"sequence"})
        }
        self.sequences = empty_sequence_mean(dtype=dtype, device=device) if "sequence" in sources else None
        self._max_tokens = max_tokens
        self._slots = 0
        self._dtype = dtype
        self._device = device

    def update(self, hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
        """Add the tokens of one forward."""
        states, mask = check_hidden_states(hidden_states, attention_mask)
        if self._max_tokens is not None:
            states, mask = self._within_budget(states, mask, self._max_tokens)
        if mask.numel() == 0:
            return
        with full_precision(states.device):
            if "pooled" in self.moments or self.sequences is not None:
                tokens = prepare_tokens(states, mask, center=True, normalize=True, dtype=self._dtype)
                if "pooled" in self.moments:
                    self._add("pooled", token_moments(tokens))
                if self.sequences is not None:
                    batch = SequenceMean(*self._home(sequence_mean(tokens, center=True)))
                    self.sequences = merge_sequence_means(self.sequences, batch)
            if "raw" in self.moments:
                raw = prepare_tokens(states, mask, center=False, normalize=False, dtype=self._dtype)
                self._add("raw", token_moments(raw))

    def _add(self, source: Source, batch: Moments) -> None:
        seen, batch = self.moments[source], Moments(*self._home(batch))
        if seen.mean.shape[0] not in (0, batch.mean.shape[0]):
            raise ValueError(f"it had {seen.mean.shape[0]} features before and has {batch.mean.shape[0]} now.")
        self.moments[source] = merge_moments(seen, batch) if seen.mean.shape[0] else batch

    def _home(self, state: tuple[Tensor, ...]) -> list[Tensor]:
        # The layers of a model that is spread over several devices come together on one.
        return [tensor.to(self._device) for tensor in state]

    def _within_budget(self, states: Tensor, mask: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """The first sequences, the last of them cut short, so that no more than ``budget`` tokens count.

        By shape and not by what the mask holds, since a look into it would make the host wait for the device.
        """
        left = max(budget - self._slots, 0)
        sequences = -(-left // states.shape[1])
        states, mask = states[:sequences], mask[:sequences]
        self._slots += mask.numel()
        position = mask.flatten().cumsum(0).view_as(mask)
        return states, mask & (position <= left)


class Reading(NamedTuple):
    """The numbers of one layer."""

    values: dict[str, float]
    """By metric; one that is not defined, as where no token was seen, is not there."""
    nonfinite: int


def compute_readings(accumulators: Mapping[str, LayerAccumulator], metrics: Sequence[str]) -> dict[str, Reading]:
    """The chosen metrics of every layer: one reduction, one batched decomposition per shape, one transfer.

    Every rank makes the same collective calls, whatever its layers have seen.
    """
    layers = list(accumulators.values())
    quantities: dict[str, list[Tensor]] = {}
    nonfinite: list[Tensor] = []
    for source in layers[0].moments:
        moments = [layer.moments[source] for layer in layers]
        if is_distributed():
            moments = all_reduce_moments(moments)
        summaries = _summaries(moments, center="sequence" if source == "pooled" else None)
        nonfinite = [m.num_nonfinite for m in moments]
        for name in metrics:
            if CATALOGUE[name] == source:
                quantities[name] = [summary[name] for summary in summaries]
    means = [layer.sequences for layer in layers if layer.sequences is not None]
    if means:
        if is_distributed():
            means = all_reduce_sequence_means(means)
        nonfinite = [m.num_nonfinite for m in means]
        entropy = [torch.where(m.num_sequences > 0, m.mean, torch.nan) for m in means]
        of_sequences = {"sequence_matrix_entropy": entropy, "sequence_effective_rank": [e.exp() for e in entropy]}
        quantities.update({name: of_sequences[name] for name in metrics if name in of_sequences})
    *rows, bad = _to_host([*quantities.values(), nonfinite])
    values = [dict(zip(quantities, column, strict=True)) for column in zip(*rows, strict=True)]
    return {
        layer: Reading({name: value for name, value in own.items() if math.isfinite(value)}, int(count))
        for layer, own, count in zip(accumulators, values, bad, strict=True)
    }


def _summaries(moments: Sequence[Moments], *, center: Center) -> list[dict[str, Tensor]]:
    """:func:`spectral_summary` of each, decomposed in batches of one shape; NaN where no token was seen."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for index, m in enumerate(moments):
        by_width[m.mean.shape[0]].append(index)
    found: dict[int, dict[str, Tensor]] = {}
    for width, indices in by_width.items():
        size = max(1, _BATCH_NUMBERS // max(width, 1) ** 2)
        for batch in (indices[start : start + size] for start in range(0, len(indices), size)):
            if width == 0:
                nan = moments[batch[0]].mean.new_full((len(batch),), torch.nan)
                summary = dict.fromkeys(CATALOGUE, nan)
            else:
                with full_precision(moments[batch[0]].mean.device):
                    covariances = torch.stack([covariance(moments[i], center=center) for i in batch])
                    summary = spectral_summary(unit_trace_eigenvalues(covariances))
            for row, index in enumerate(batch):
                seen = moments[index].num_tokens > 0
                found[index] = {name: torch.where(seen, value[row], torch.nan) for name, value in summary.items()}
    return [found[index] for index in range(len(moments))]


def _to_host(rows: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    # MPS has no float64.
    dtype = torch.float32 if rows[0][0].device.type == "mps" else torch.float64
    table = torch.stack([torch.stack([value.to(dtype) for value in row]) for row in rows])
    return table.tolist()
