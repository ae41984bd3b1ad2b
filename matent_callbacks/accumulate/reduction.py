"""Bringing the statistics of all ranks together: O(d^2) numbers a rank and layer, whatever the world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.moments import Moments, ratio
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.accumulate.symmetric import PackedMoments, unpack_symmetric


def is_distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_moments(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> list[Moments]:
    """Moments of the tokens of all ranks. Every rank calls this with as many; one without tokens learns d here."""
    widths = agreed_widths([m.mean.shape[0] for m in moments], moments[0].mean.device, group)
    if None in widths:
        raise ValueError("`hidden_states` must have as many features on every rank as on the others.")
    sequences = torch.stack([m.num_sequences for m in moments])
    dist.all_reduce(sequences, group=group)
    packed = [PackedMoments.of(m) for m in moments]
    common = []
    for shared, num_sequences in zip(_about_the_common_mean(packed, widths, group), sequences, strict=True):
        if shared.scatter.numel():
            dist.all_reduce(shared.scatter, group=group)
        scatter = unpack_symmetric(shared.scatter)
        common.append(Moments(shared.num_tokens, num_sequences, shared.num_nonfinite, shared.mean, scatter))
    return common


def share_moments(moments: Sequence[PackedMoments], widths: Sequence[int | None]) -> list[PackedMoments | None]:
    """The moments of all ranks' tokens, each on one rank only: the i-th on :func:`owner_of` i.

    ``widths`` is what :func:`agreed_widths` gave; where it is ``None`` nothing is sent and no rank has anything.
    """
    shared_out: list[PackedMoments | None] = [None] * len(moments)
    usable = [index for index, width in enumerate(widths) if width is not None]
    reduced = _about_the_common_mean([moments[i] for i in usable], [widths[i] for i in usable], None)
    for index, shared in zip(usable, reduced, strict=True):
        if shared.scatter.numel():
            dist.reduce(shared.scatter, dst=owner_of(index))
        if owner_of(index) == dist.get_rank():
            shared_out[index] = shared
    return shared_out


def owner_of(index: int) -> int:
    """The rank that decomposes the i-th matrix."""
    return index % dist.get_world_size()


def agreed_widths(own: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None) -> list[int | None]:
    """Number of features of each on all ranks: 0 where none has seen a token, ``None`` where ranks differ."""
    if not own:
        return []
    unseen = torch.iinfo(torch.int64).max
    table = torch.tensor([list(own), [-(width or unseen) for width in own]], device=device)
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
    weighted = torch.stack([m.mean for m in means]) * ratio(local, counts[:, 0], means[0].mean.dtype)
    dist.all_reduce(weighted, group=group)
    return [SequenceMean(count[0], count[1], mean) for count, mean in zip(counts, weighted, strict=True)]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over the ranks of each value."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def _about_the_common_mean(
    moments: Sequence[PackedMoments], widths: Sequence[int | None], group: dist.ProcessGroup | None
) -> Iterator[PackedMoments]:
    """Counts and mean of all ranks with this rank's scatter about that mean: the sum over ranks needs no further term.

    One layer at a time, so that no more than one scatter is there twice.
    """
    if not moments:
        return
    ready = [_widened(m, width) for m, width in zip(moments, widths, strict=True) if width is not None]
    counts = torch.stack([torch.stack(m[:2]) for m in ready])
    dist.all_reduce(counts, group=group)
    means = torch.cat(
        [m.mean * ratio(m.num_tokens, total[0], m.mean.dtype) for m, total in zip(ready, counts, strict=True)]
    )
    if means.numel():
        dist.all_reduce(means, group=group)
    for m, total, mean in zip(ready, counts, torch.split(means, [len(m.mean) for m in ready]), strict=True):
        # A copy of its own: the other ranks' are added into it, and the caller may go on with this rank's.
        scatter = m.scatter.clone() if m.about_origin else m.scatter_about(mean)
        yield PackedMoments(total[0], total[1], mean.clone(), scatter, about_origin=m.about_origin)


def _widened(moments: PackedMoments, num_features: int) -> PackedMoments:
    """A rank that has seen nothing takes the width that the others have."""
    if moments.num_features == num_features:
        return moments
    mean, scatter = moments.mean, moments.scatter
    return moments._replace(
        mean=mean.new_zeros(0 if moments.about_origin else num_features),
        scatter=scatter.new_zeros((num_features + 1) // 2, num_features + 1),
    )
