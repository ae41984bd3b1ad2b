"""Bringing the statistics of all ranks together: O(d^2) numbers a rank and layer, whatever the world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    widths = agreed_widths(moments, group)
    if None in widths:
        raise ValueError("`hidden_states` must have as many features on every rank as on the others.")
    common = []
    for counts, mean, packed in _about_the_common_mean(moments, widths, group):
        if packed.numel():
            dist.all_reduce(packed, group=group)
        common.append(Moments(counts[0], counts[1], counts[2], mean, unpack_symmetric(packed, mean.shape[0])))
    return common


def share_moments(moments: Sequence[Moments], widths: Sequence[int | None]) -> list[Moments | None]:
    """The moments of all ranks' tokens, each on one rank only: the i-th on :func:`owner_of` i.

    ``widths`` is what :func:`agreed_widths` gave; where it is ``None`` nothing is sent and no rank has anything.
    """
    shared_out: list[Moments | None] = [None] * len(moments)
    usable = [index for index, width in enumerate(widths) if width is not None]
    reduced = _about_the_common_mean([moments[i] for i in usable], [widths[i] for i in usable], None)
    for index, (counts, mean, packed) in zip(usable, reduced, strict=True):
        if packed.numel():
            dist.reduce(packed, dst=owner_of(index))
        if owner_of(index) == dist.get_rank():
            shared_out[index] = Moments(counts[0], counts[1], counts[2], mean, unpack_symmetric(packed, mean.shape[0]))
    return shared_out


def owner_of(index: int) -> int:
    """The rank that decomposes the i-th matrix."""
    return index % dist.get_world_size()


def agreed_widths(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> list[int | None]:
    """Number of features of each on all ranks: 0 where none has seen a token, ``None`` where ranks differ."""
    if not moments:
        return []
    unseen = torch.iinfo(torch.int64).max
    own = [m.mean.shape[0] for m in moments]
    table = torch.tensor([own, [-(width or unseen) for width in own]], device=moments[0].mean.device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return [widest if widest in (0, -negative) else None for widest, negative in table.T.tolist()]


def agreed_failures(failed: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of them failed on any rank."""
    flags = torch.tensor(failed, dtype=torch.int64, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


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


def _about_the_common_mean(
    moments: Sequence[Moments], widths: Sequence[int | None], group: dist.ProcessGroup | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Counts and mean of all ranks, and this rank's scatter about that mean, packed: their sum needs no further term.

    Chan et al. 1979. One layer at a time, so that no more than one scatter is there twice.
    """
    if not moments:
        return
    ready = [_widened(m, width) for m, width in zip(moments, widths, strict=True) if width is not None]
    counts = torch.stack([torch.stack(m[:3]) for m in ready])
    dist.all_reduce(counts, group=group)
    means = torch.cat(
        [m.mean * _ratio(m.num_tokens, total[0], m.mean.dtype) for m, total in zip(ready, counts, strict=True)]
    )
    if means.numel():
        dist.all_reduce(means, group=group)
    for m, total, mean in zip(ready, counts, torch.split(means, [m.mean.shape[0] for m in ready]), strict=True):
        offset = m.mean - mean
        yield total, mean.clone(), pack_symmetric(m.scatter.addr(offset, offset * m.num_tokens))


def pack_symmetric(matrix: Tensor) -> Tensor:
    """``(d, d)`` to ``(ceil(d / 2), d + 1)``: one half, by slices, since indices would take more than what they save.

    The two triangles on the diagonal fit into each other, beside the block that is off it.
    """
    d = matrix.shape[0]
    half = (d + 1) // 2
    packed = matrix.new_zeros(half, d + 1)
    packed[:, :half] = matrix[:half, :half].tril()
    packed[: d - half, 1 : d - half + 1] += matrix[half:, half:].triu()
    packed[:, half + 1 :] = matrix[:half, half:]
    return packed


def unpack_symmetric(packed: Tensor, num_features: int) -> Tensor:
    """The inverse of :func:`pack_symmetric`."""
    d, half = num_features, packed.shape[0]
    matrix = packed.new_empty(d, d)
    lower, upper = packed[:, :half].tril(), packed[: d - half, 1 : d - half + 1].triu()
    matrix[:half, :half] = lower + lower.tril(-1).T
    matrix[half:, half:] = upper + upper.triu(1).T
    matrix[:half, half:] = packed[:, half + 1 :]
    matrix[half:, :half] = packed[:, half + 1 :].T
    return matrix


def _ratio(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    # Whole numbers divided by whole numbers give the default dtype, which may be less.
    return part.to(dtype) / whole.clamp(min=1).to(dtype)


def _widened(moments: Moments, num_features: int) -> Moments:
    """A rank that has seen nothing takes the width that the others have."""
    if moments.mean.shape[0] == num_features:
        return moments
    zeros = empty_moments(num_features, dtype=moments.mean.dtype, device=moments.mean.device)
    return zeros._replace(num_nonfinite=moments.num_nonfinite)
