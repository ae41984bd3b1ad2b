"""Bringing the statistics of all ranks together by all-reduce: O(d^2) numbers a rank, whatever the world size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.functional.moments import Moments, empty_moments
from matent_callbacks.functional.sequences import SequenceMean


def is_distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_moments(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> list[Moments]:
    """Moments of the tokens of all ranks. Every rank calls this with as many; one without tokens learns d here."""
    if not moments:
        return []
    features = torch.tensor([m.mean.shape[0] for m in moments], device=moments[0].mean.device)
    dist.all_reduce(features, op=dist.ReduceOp.MAX, group=group)
    counts = torch.stack([torch.stack(m[:3]) for m in moments])
    dist.all_reduce(counts, group=group)
    return [
        _all_reduce_one(_widened(m, d), total, group)
        for m, d, total in zip(moments, features.tolist(), counts, strict=True)
    ]


def all_reduce_sequence_means(
    means: Sequence[SequenceMean], group: dist.ProcessGroup | None = None
) -> list[SequenceMean]:
    """Mean over the sequences of all ranks."""
    if not means:
        return []
    counts = torch.stack([torch.stack(m[:2]) for m in means])
    local = counts[:, 0].clone()
    dist.all_reduce(counts, group=group)
    weighted = torch.stack([m.mean for m in means]) * _ratio(local, counts[:, 0], means[0].mean.dtype)
    dist.all_reduce(weighted, group=group)
    return [SequenceMean(count[0], count[1], mean) for count, mean in zip(counts, weighted, strict=True)]


def _all_reduce_one(moments: Moments, counts: Tensor, group: dist.ProcessGroup | None) -> Moments:
    mean = moments.mean * _ratio(moments.num_tokens, counts[0], moments.mean.dtype)
    dist.all_reduce(mean, group=group)
    # Chan et al. 1979: each rank's scatter about the common mean, so that the sum needs no further term.
    offset = moments.mean - mean
    shifted = moments.scatter.addr(offset, offset * moments.num_tokens)
    upper = torch.triu_indices(*shifted.shape, device=shifted.device)
    packed = shifted[upper[0], upper[1]]
    dist.all_reduce(packed, group=group)
    scatter = torch.zeros_like(shifted)
    scatter[upper[0], upper[1]] = packed
    scatter = scatter + scatter.triu(1).T
    return Moments(counts[0], counts[1], counts[2], mean, scatter)


def _ratio(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    # Whole numbers divided by whole numbers give the default dtype, which may be less.
    return part.to(dtype) / whole.clamp(min=1).to(dtype)


def _widened(moments: Moments, num_features: int) -> Moments:
    """A rank that has seen nothing takes the width that the others have."""
    if moments.mean.shape[0] == num_features:
        return moments
    zeros = empty_moments(num_features, dtype=moments.mean.dtype, device=moments.mean.device)
    return zeros._replace(num_nonfinite=moments.num_nonfinite)
