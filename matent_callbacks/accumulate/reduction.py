"""Reduces statistics over the ranks: O(d^2) numbers from each rank and layer, whatever the world size."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.moments import Moments, ratio, scatter_about, with_scatter
from matent_callbacks.accumulate.sequence_mean import SequenceMean

Groups = Sequence[dist.ProcessGroup | None]
"""Groups along different dimensions of a mesh of ranks; ``None``: all ranks."""

_Result = TypeVar("_Result")


class AllOrNone:
    """Lets an error in a ``with`` block on one rank raise on all ranks, so that none waits for another in vain.

    Each rank runs the block, and then learns from one all-reduce for each group whether all of them succeeded. The
    error itself is raised where it occurred, on every other rank a ``RuntimeError``.

    Collective calls inside the block would still hang if a rank had left it. So steps between such calls are run by
    ``attempt(step, *args)``, which keeps the first error until the end of the block and skips the steps after it.

    Args:
        device: Of the tensors that are exchanged.
        groups: The ranks that take part. Without a group nothing is exchanged.
        message: Of the error on the ranks on which nothing failed.
        numbers: How many numbers each rank compares with those of the others: see :attr:`numbers`.

    Example:
        >>> import torch
        >>> from matent_callbacks.accumulate.reduction import AllOrNone
        >>> with AllOrNone(torch.device("cpu"), []) as attempt:
        ...     half = attempt(lambda: 1 / 2)
        >>> half
        0.5
    """

    def __init__(
        self, device: torch.device, groups: Groups, message: str = "another rank failed.", *, numbers: int = 0
    ) -> None:
        self.numbers = [0] * numbers
        """To be set in the block, where they are known."""
        self.ranges: list[tuple[int, int]] = []
        """Afterwards: the least and the greatest of each number over all ranks."""
        self._device = device
        self._groups = groups
        self._message = message
        self._error: Exception | None = None

    def __enter__(self) -> AllOrNone:
        return self

    def __call__(self, step: Callable[..., _Result], *args: object) -> _Result | None:
        """Return what ``step`` returns; ``None`` if it, or an earlier step, failed."""
        if self._error is None:
            try:
                return step(*args)
            except Exception as error:
                self._error = error
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # the process is about to end
        # The traceback of an error refers to this object, which must not refer to the error in turn: what its frames
        # hold would stay in memory until the garbage collector runs.
        own, self._error = self._error, None
        failed = error is not None or own is not None
        if self._groups:
            (_, any_failed), *self.ranges = extremes([int(failed), *self.numbers], self._device, self._groups)
            if any_failed and not failed:
                raise RuntimeError(self._message)
        else:
            self.ranges = [(number, number) for number in self.numbers]
        if error is None and own is not None:
            try:
                raise own
            finally:
                del own


def extremes(numbers: Sequence[int], device: torch.device, groups: Groups) -> list[tuple[int, int]]:
    """Return the least and the greatest of each number over the ranks, by one all-reduce for each group."""
    table = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    found = table.tolist()
    return [(-least, most) for most, least in zip(found[: len(numbers)], found[len(numbers) :], strict=True)]


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
    """Find out whether all ranks are about to exchange the same, by an all-reduce of four numbers.

    Collectives of different shapes would hang. The descriptions themselves are only sent if they differ.
    """
    number = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    (smallest, largest), (_, any_failed) = extremes([number, int(failed)], device, [group])
    if largest == smallest:
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
    owners: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Moments | None]:
    """Return the moments of the tokens of all ranks. Every rank has to call this with as many moments as the others.

    Args:
        moments: Of the tokens of this rank, all of one dtype. They stay as they are.
        widths: What :func:`agreed_widths` returned. For moments without a width ``None`` is returned.
        owners: For each the rank of the group that gets it, and for which others get ``None``; ``None``: every rank
            gets all.
        group: The ranks that take part; ``None``: all.
    """
    reduced: list[Moments | None] = [None] * len(moments)
    indices = [index for index, width in enumerate(widths) if width is not None]
    usable = [_widened(moments[index], width) for index, width in enumerate(widths) if width is not None]
    for index, common in zip(indices, _about_common_mean(usable, group), strict=True):
        if common.has_scatter and owners is not None:
            dist.reduce(common.scatter, dst=global_rank(owners[index], group), group=group)
        elif common.has_scatter:
            dist.all_reduce(common.scatter, group=group)
        if owners is None or owners[index] == dist.get_rank(group):
            reduced[index] = common
    return reduced


def global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    """Return the global rank of a rank of ``group``."""
    return rank if group is None else dist.get_global_rank(group, rank)


def agreed_failures(failed: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Return for each flag whether it is set on any rank."""
    return [bool(any_failed) for _, any_failed in extremes([int(flag) for flag in failed], device, [group])]


def all_reduce_sequence_means(
    means: Sequence[SequenceMean], group: dist.ProcessGroup | None = None
) -> list[SequenceMean]:
    """Mean over the sequences of all ranks."""
    if not means:
        return []
    counts = torch.stack([torch.stack(m[:2]) for m in means])
    local = counts[:, 0].clone()
    dist.all_reduce(counts, group=group)
    own = _of_common_length([m.mean for m in means], counts.device, group)
    dtype = functools.reduce(torch.promote_types, (mean.dtype for mean in own))
    shares = ratio(local, counts[:, 0], dtype)
    weighted = torch.cat([mean.flatten() * share for mean, share in zip(own, shares, strict=True)])
    dist.all_reduce(weighted, group=group)
    common = torch.split(weighted, [mean.numel() for mean in own])
    return [
        SequenceMean(count[0], count[1], mean.view_as(like).to(like.dtype))
        for count, mean, like in zip(counts, common, own, strict=True)
    ]


def _of_common_length(
    means: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> Sequence[Tensor]:
    """Return numbers as they are; vectors as zeros on ranks that have seen none, and as NaN where ranks differ."""
    if not any(mean.ndim for mean in means):
        return means
    unknown = torch.iinfo(torch.int64).max
    lengths = [mean.numel() for mean in means]
    found = extremes([*lengths, *(length or unknown for length in lengths)], device, [group])
    common = []
    for mean, (_, most), (least, _) in zip(means, found, found[len(means) :], strict=False):
        new = mean.new_full((most,), torch.nan if least != most else 0.0)
        common.append(new if mean.ndim and (least != most or not mean.numel()) else mean)
    return common


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
