"""Reduces statistics over the ranks: O(d^2) numbers from each rank and layer, whatever the world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.moments import Moments, ratio, scatter_about, with_scatter
from matent_callbacks.accumulate.sequence_mean import SequenceMean


class Width(NamedTuple):
    """The shape of moments that all ranks agreed on."""

    num_features: int
    """d; 0 if no rank knows it."""
    about_origin: bool | None
    """Whether the scatter is about the origin; ``None`` if no rank has one."""


class Agreement(NamedTuple):
    """What ranks know of each other before they exchange anything large."""

    any_failed: bool
    """Whether anything failed on any rank."""
    descriptions: list[str]
    """What each rank is about to exchange, if that is not the same on all; empty if it is."""


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def check_groups(process_group: Any, context_group: Any) -> None:
    """Raise unless each is ``None`` or a process group with this rank in it, and the first holds all of the second."""
    _check_group("process_group", process_group)
    _check_group("context_group", context_group)
    if process_group is None or context_group is None:
        return
    members, parts = (dist.get_process_group_ranks(group) for group in (process_group, context_group))
    if not set(parts) <= set(members):
        raise ValueError(
            f"`process_group` must hold all ranks of `context_group`, {parts}, since their tokens belong together, "
            f"got {members}."
        )


def _check_group(name: str, group: Any) -> None:
    if group is None:
        return
    # `new_group` gives this number to the ranks that are not in the group.
    is_of_others = dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER
    if not is_of_others and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"`{name}` must be None or a torch.distributed.ProcessGroup, got {type(group).__name__}.")
    if is_of_others or dist.get_rank(group) < 0:
        raise ValueError(f"`{name}` must hold this rank, {dist.get_rank()}, got one of other ranks.")


def agree(description: str, failed: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> Agreement:
    """Find out whether all ranks are about to exchange the same, by an all-reduce of three numbers.

    Collectives of different shapes would hang. The descriptions themselves are only sent if they differ.
    """
    number = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    table = torch.tensor([number, -number, failed], dtype=torch.int64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    largest, negative_smallest, any_failed = table.tolist()
    if largest == -negative_smallest:
        return Agreement(bool(any_failed), [])
    own = torch.tensor(list(description.encode()), dtype=torch.uint8, device=device).unsqueeze(-1)
    everybodys = all_gather_ragged(own, group)
    return Agreement(bool(any_failed), [bytes(text.flatten().tolist()).decode() for text in everybodys])


def agreed_widths(
    moments: Sequence[Moments], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[Width | None]:
    """Return the common width of each, ``None`` if ranks differ in d. Ranks without tokens learn d from the others."""
    if not moments:
        return []
    unknown = torch.iinfo(torch.int64).max
    rows = [(m.num_features, -(m.num_features or unknown), m.has_scatter, len(m.mean)) for m in moments]
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return [
        Width(widest, num_means == 0 if has_scatter else None) if widest in (0, -negative_narrowest) else None
        for widest, negative_narrowest, has_scatter, num_means in table.tolist()
    ]


def reduce_moments(
    moments: Sequence[Moments],
    widths: Sequence[Width | None],
    *,
    share_out: bool = False,
    group: dist.ProcessGroup | None = None,
) -> list[Moments | None]:
    """Return the moments of the tokens of all ranks. Every rank has to call this with as many moments as the others.

    Args:
        moments: Of the tokens of this rank. They stay as they are.
        widths: What :func:`agreed_widths` returned. For moments without a width ``None`` is returned.
        share_out: Send the i-th moments to rank i of the group, modulo its size, and return ``None`` for those of
            others; otherwise every rank gets all.
        group: The ranks that take part; ``None``: all.
    """
    reduced: list[Moments | None] = [None] * len(moments)
    indices = [index for index, width in enumerate(widths) if width is not None]
    usable = [_widened(moments[index], width) for index, width in enumerate(widths) if width is not None]
    for index, common in zip(indices, _about_common_mean(usable, group), strict=True):
        owner = index % dist.get_world_size(group)
        if common.has_scatter and share_out:
            dist.reduce(common.scatter, dst=global_rank(owner, group), group=group)
        elif common.has_scatter:
            dist.all_reduce(common.scatter, group=group)
        if not share_out or owner == dist.get_rank(group):
            reduced[index] = common
    return reduced


def global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    """Return the global rank of a rank of ``group``."""
    return rank if group is None else dist.get_global_rank(group, rank)


def agreed_failures(failed: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Return for each flag whether it is set on any rank."""
    flags = torch.tensor(failed, dtype=torch.int64, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
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


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of each value."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def _about_common_mean(moments: Sequence[Moments], group: dist.ProcessGroup | None) -> Iterator[Moments]:
    """Yield counts and mean of all ranks, with the scatter of this rank about that mean, which is still to be summed.

    The scatters are copies, made one at a time, so that no more than one of them is in memory twice.
    """
    if not moments:
        return
    counts = torch.stack([torch.stack(m[:3]) for m in moments])
    dist.all_reduce(counts, group=group)
    shares = [ratio(m.num_tokens, total[0], m.mean.dtype) for m, total in zip(moments, counts, strict=True)]
    means = torch.cat([m.mean * share for m, share in zip(moments, shares, strict=True)])
    if means.numel():
        dist.all_reduce(means, group=group)
    for m, total, mean in zip(moments, counts, torch.split(means, [len(m.mean) for m in moments]), strict=True):
        yield Moments(total[0], total[1], total[2], mean.clone(), scatter_about(m, mean))


def _widened(moments: Moments, width: Width) -> Moments:
    """``moments`` as they are, or zeros of the width of the other ranks if this rank has seen no token."""
    if width.about_origin is None:
        return moments
    return with_scatter(moments, width.num_features, about_origin=width.about_origin)
