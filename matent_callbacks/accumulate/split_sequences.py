"""Statistics of sequences split over ranks, as in context parallelism: centred by their whole mean, counted once.

They take collectives in the middle of a forward pass, where a rank that fails would leave the others waiting. So ranks
first agree that all of them are able to go on, and an error after that is only raised once no rank waits any more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.pieces import Piece, rows_of_a_piece, slices
from matent_callbacks.accumulate.pooled_tokens import PooledTokens, entropy_of_lower
from matent_callbacks.accumulate.reduction import global_rank
from matent_callbacks.accumulate.sequence_mean import SequenceEntropies
from matent_callbacks.accumulate.symmetric import add_second_moment, lower_triangle
from matent_callbacks.functional._tokens import (
    Tokens,
    finite_rows,
    into_range,
    largest_of_rows,
    scaled_to_unit_length_,
)

Groups = Sequence[dist.ProcessGroup]
"""Groups along different dimensions of a mesh of ranks, which together hold the parts of the same sequences."""

_Result = TypeVar("_Result")


class SequenceParts:
    """One batch of sequences of which this rank holds a part, with the buffers that ranks exchange.

    Args:
        count: Number of sequences B.
        width: Number of features d.
        local: Returns states ``(B, T, d)`` and mask ``(B, T)`` bool: T is that of this rank, and may be 0.
        groups: The groups whose ranks hold the other parts.
        dtype: Of the statistics.
        device: Of the states.
        sequences: Whether the entropy of each sequence is asked for.
    """

    def __init__(
        self,
        count: int,
        width: int,
        local: Callable[[], tuple[Tensor, Tensor]],
        groups: Groups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        sequences: bool,
    ) -> None:
        self.count = count
        self.width = width
        self.device = device
        self._local = local
        self._groups = groups
        self._dtype = dtype
        self._states = torch.empty(count, 0, width, dtype=dtype, device=device)
        self._mask = self._valid = torch.empty(count, 0, dtype=torch.bool, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        # The sum of the tokens of each sequence, and their number. In float64: rounding of a mean that dwarfs the
        # spread would show, and a second mean of what is left would have to be exchanged as well.
        self._totals = torch.zeros(count, width + 1, dtype=torch.float64, device=device)
        half = (width + 1) // 2 if sequences else 0
        self._scatter = torch.zeros(half, width + 1, dtype=dtype, device=device)

    def add_to(
        self,
        pooled: PooledTokens | None,
        raw: PooledTokens | None,
        *,
        limited: Callable[[Tensor], Tensor],
    ) -> SequenceEntropies | None:
        """Add the tokens of this rank: centred and normalised to ``pooled``, and as they are to ``raw``.

        To be called by all ranks of the groups, with autocast and TF32 switched off. They exchange one sum per
        sequence, d + 1 numbers, and for entropies of sequences half of a second moment each, d(d + 1)/2 numbers.
        ``limited`` takes the mask and returns it without the tokens that are not to count.

        Returns:
            The entropies of a share of the sequences: each is decomposed on one rank. ``None`` if not asked for.
        """
        attempt = _Attempt()
        attempt(self._bring, limited)
        attempt(self._sum_up)
        for group in self._groups:
            dist.all_reduce(self._totals, group=group)
        if pooled is not None:
            attempt(self._add_tokens, pooled)
        if raw is not None:
            attempt(functools.partial(raw.update, self._states, self._mask, normalize=False, dtype=self._dtype))
        found = self._entropies(attempt) if self._scatter.numel() else None
        attempt.end()
        return found

    @property
    def counts(self) -> Tensor:
        """``(B, T)`` bool: the tokens of this rank that the mask, and the limit on their number, have in."""
        return self._mask

    def _bring(self, limited: Callable[[Tensor], Tensor]) -> None:
        self._states, mask = self._local()
        self._mask = limited(mask)
        self._valid = torch.empty_like(mask)

    def _sum_up(self) -> None:
        for some, part in self._places(torch.float64):
            x = self._states[some, part].to(self._dtype)
            finite, counts = finite_rows(x), self._mask[some, part]
            valid = self._valid[some, part] = counts & finite
            self._nonfinite += (counts & ~finite).sum()
            self._totals[some, :-1] += torch.where(valid.unsqueeze(-1), x, 0.0).sum(1, dtype=torch.float64)
            self._totals[some, -1] += valid.sum(1)
            del x

    def _add_tokens(self, pooled: PooledTokens) -> None:
        pooled.reserve(self._states)
        is_first = all(dist.get_rank(group) == 0 for group in self._groups)
        for some, part in self._places(self._dtype):
            # Counts of whole sequences go with the first part, on one rank only.
            begins = int(part.start == 0)
            num_sequences = (self._totals[some, -1] > 0).sum() * int(is_first) * begins
            nonfinite = self._nonfinite * int(some.start == 0) * begins
            pooled.add(Piece(Tokens(self._prepared(some, part), self._valid[some, part], nonfinite), num_sequences))

    def _entropies(self, attempt: _Attempt) -> SequenceEntropies:
        scatter = self._scatter
        owned, found, lower = [], [scatter.new_zeros(2, 0)], None
        sizes = [dist.get_world_size(group) for group in self._groups]
        for number in range(self.count):
            scatter.zero_()
            attempt(self._add_up, scatter, number)
            turn = number % math.prod(sizes)
            if _reduced(scatter, self._groups, _place(turn, sizes)):
                owned.append(number)
                lower = attempt(lower_triangle, scatter)
            # Only when each rank has one: otherwise the others would wait for this one in the next reduction.
            if lower is not None and (turn == math.prod(sizes) - 1 or number == self.count - 1):
                both = attempt(_entropy_and_trace, lower)
                found += [] if both is None else [both.unsqueeze(1)]
                lower = None
        counts = self._totals[owned, -1].to(torch.int64)
        entropies, traces = torch.cat(found, dim=1)
        return SequenceEntropies(entropies, counts, self._nonfinite, traces)

    def _add_up(self, scatter: Tensor, number: int) -> None:
        for part in slices(self._states.shape[1], rows_of_a_piece(self._states.shape[2], self._dtype)):
            add_second_moment(scatter, self._prepared(slice(number, number + 1), part)[0])

    def _prepared(self, some: slice, part: slice) -> Tensor:
        mean = self._totals[some, :-1] / self._totals[some, -1:].clamp(min=1)
        valid = self._valid[some, part]
        x = self._states[some, part].to(self._dtype)
        # Of this part alone: a direction does not depend on the scale.
        largest = torch.where(valid, largest_of_rows(x), 0.0)
        both = torch.cat([largest, largest_of_rows(mean).to(self._dtype).unsqueeze(1)], dim=1)
        factor = into_range(both.amax(1), self._dtype)
        x, mean = x * factor[:, None, None], mean * factor.unsqueeze(1)
        rounded = mean.to(self._dtype)
        x = x - rounded.unsqueeze(1)
        x -= (mean - rounded).to(self._dtype).unsqueeze(1)
        return scaled_to_unit_length_(x.masked_fill_(~valid.unsqueeze(-1), 0.0))

    def _places(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
        """Yield slices of sequences and of their tokens that fit into the work space."""
        count, length, d = self._states.shape
        rows = rows_of_a_piece(d, dtype)
        for some in slices(count, max(1, rows // max(1, length))):
            for part in slices(length, rows):
                yield some, part


def _entropy_and_trace(lower: Tensor) -> Tensor:
    trace = lower.trace()  # before the solver makes use of its memory
    return torch.stack([entropy_of_lower(lower, alpha=1.0), trace])


def agreed_parts(prepare: Callable[[], SequenceParts], groups: Groups, device: torch.device) -> SequenceParts:
    """Return what ``prepare`` returns, if it succeeds on every rank of ``groups`` with as many sequences and features.

    Costs one device-to-host sync.

    Raises:
        Exception: What ``prepare`` raised.
        ValueError: If it raised on another rank, or ranks differ in the number of sequences or features.
    """
    error, table = None, [0, 0, 0, 0, 1]
    try:
        parts = prepare()
        table = [parts.count, -parts.count, parts.width, -parts.width, 0]
    except Exception as raised:
        error = raised
    agreed = torch.tensor(table, dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    most, negative_least, widest, negative_narrowest, failed = agreed.tolist()
    if error is not None:
        raise error
    if failed:
        raise ValueError("another rank, which holds a part of the same sequences, failed to read it.")
    if (most, widest) != (-negative_least, -negative_narrowest):
        raise ValueError(
            "ranks that hold parts of the same sequences must have as many of them, of one width, "
            f"got {-negative_least} to {most} sequences of {-negative_narrowest} to {widest} features."
        )
    return parts


class _Attempt:
    """Runs steps until one fails and skips the others, so that this rank still takes part in all collectives."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def __call__(self, work: Callable[..., _Result], *args: object) -> _Result | None:
        """Return what ``work`` returns; ``None`` if it, or an earlier step, failed."""
        if self._error is None:
            try:
                return work(*args)
            except Exception as error:
                self._error = error
        return None

    def end(self) -> None:
        """Raise the error of the step that failed, if any."""
        if self._error is not None:
            raise self._error


def _reduced(tensor: Tensor, groups: Groups, owner: Sequence[int]) -> bool:
    """Reduce a tensor to one rank, given by its rank in each group; return whether this rank is the one."""
    for group, own in zip(groups, owner, strict=True):
        dist.reduce(tensor, dst=global_rank(own, group), group=group)
        if dist.get_rank(group) != own:
            return False
    return True


def _place(number: int, sizes: Sequence[int]) -> list[int]:
    """Return the digits of ``number`` in the mixed radix ``sizes``, the lowest first."""
    digits = []
    for size in sizes:
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits
