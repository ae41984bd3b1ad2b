"""Statistics of sequences split over ranks, as in context parallelism: centred by their whole mean, counted once.

They take collectives in the middle of a forward pass, where a rank that fails would leave the others waiting. So ranks
first agree that all of them are able to go on, and an error after that is only raised once no rank waits any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.pieces import Piece, rows_of_a_piece, slices
from matent_callbacks.accumulate.pooled_tokens import entropy_of_lower
from matent_callbacks.accumulate.reduction import AllOrNone, global_rank
from matent_callbacks.accumulate.sequences import SequenceEntropies, Sequences, log_norms_in_pieces, places
from matent_callbacks.accumulate.symmetric import add_second_moment, lower_triangle
from matent_callbacks.functional._tokens import (
    Tokens,
    finite_rows,
    into_range,
    largest_of_rows,
    prepare_tokens,
    scaled_to_unit_length_,
)
from matent_callbacks.functional.sinks import TokenNorms, long_tokens, sums_of_logs, with_sinks

Groups = Sequence[dist.ProcessGroup]
"""Groups along different dimensions of a mesh of ranks, which together hold the parts of the same sequences."""


class SplitSequences(Sequences):
    """One batch of sequences of which this rank holds a part, with the buffers that ranks exchange.

    All communication is in :meth:`exchange`, so that an error in a statistic keeps no other rank waiting.

    Args:
        count: Number of sequences B.
        width: Number of features d.
        local: Returns states ``(B, T, d)`` and mask ``(B, T)`` bool: T is that of this rank, and may be 0.
        groups: The groups whose ranks hold the other parts.
        dtype: Of the statistics.
        device: Of the states.
        has_entropies: Whether the entropy of each sequence is asked for.
        has_norms: Whether the lengths of the tokens are asked for.
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
        has_entropies: bool,
        has_norms: bool = False,
    ) -> None:
        mask = torch.empty(count, 0, dtype=torch.bool, device=device)
        states = torch.empty(count, 0, width, dtype=dtype, device=device)
        super().__init__(states, mask, dtype=dtype, has_entropies=has_entropies)
        self.count = count
        self.width = width
        self.device = device
        self._local = local
        self._groups = groups
        self._valid = mask
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        # The sum of the tokens of each sequence, and their number. In float64: rounding of a mean that dwarfs the
        # spread would show, and a second mean of what is left would have to be exchanged as well.
        self._totals = torch.zeros(count, width + 1, dtype=torch.float64, device=device)
        self._has_norms = has_norms
        # The sums of the logarithms of the lengths of tokens, the number of tokens, and that of long ones.
        self._lengths = torch.zeros(2, count, dtype=torch.float64, device=device)
        self._num_long = torch.zeros(count, dtype=torch.float64, device=device)
        half = (width + 1) // 2 if has_entropies else 0
        self._scatter = torch.zeros(half, width + 1, dtype=dtype, device=device)

    def exchange(self, limited: Callable[[Tensor, TokenNorms | None], Tensor]) -> None:
        """Bring this rank's tokens, and exchange what the ranks need of each other's.

        To be called by all ranks of the groups, with autocast and TF32 switched off. They exchange one sum per
        sequence, d + 1 numbers, for the lengths of tokens three more, and for entropies of sequences half of a second
        moment each, d(d + 1)/2 numbers. ``limited`` takes the mask and the lengths, and returns the mask without the
        tokens that are not to count.
        """
        with AllOrNone(self.device, []) as attempt:
            attempt(self._bring)
            if self._has_norms:
                attempt(self._sum_lengths)
                self._all_reduce(self._lengths)
                attempt(self._count_long)
                self._all_reduce(self._num_long)
                attempt(self._find_sinks)
            attempt(self._limit, limited)
            attempt(self._sum_up)
            self._all_reduce(self._totals)
            if self.has_entropies:
                self.entropies = self._entropies(attempt)

    @property
    def valid(self) -> Tensor:
        return self._valid

    @property
    def nonfinite(self) -> Tensor:
        return self._nonfinite

    def pieces(self, *, center: bool, normalize: bool) -> Iterator[Piece]:
        """Yield the tokens of this rank. Counts of whole sequences go with the first part, on one rank only."""
        for some, part in places(self.states, self.dtype):
            begins = int(part.start == 0)
            num_sequences = (self._totals[some, -1] > 0).sum() * int(self.counts_here) * begins
            nonfinite = self._nonfinite * int(some.start == 0) * begins
            if center:
                assert normalize, "tokens that ranks share are only centred to be scaled"
                values = self._directions(some, part)
            else:
                own = self.states[some, part], self.mask[some, part]
                values = prepare_tokens(*own, center=False, normalize=normalize, dtype=self.dtype).values
            yield Piece(Tokens(values, self._valid[some, part], nonfinite), num_sequences)
            del values

    @property
    def counts_here(self) -> bool:
        return all(dist.get_rank(group) == 0 for group in self._groups)

    def entropies_of(self, *, center: bool, normalize: bool, alpha: float) -> SequenceEntropies:
        raise NotImplementedError("the entropies of sequences that ranks share are computed in `exchange`.")

    def _all_reduce(self, buffer: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(buffer, group=group)

    def _bring(self) -> None:
        self.states, self.mask = self._local()

    def _sum_lengths(self) -> None:
        self._logs = log_norms_in_pieces(self.states, self.dtype)
        self._with_length = self.mask & torch.isfinite(self._logs)
        self._lengths += sums_of_logs(self._logs, self._with_length)

    def _count_long(self) -> None:
        self._long = long_tokens(self._logs, self._with_length, self._lengths)
        self._num_long += self._long.sum(1)

    def _find_sinks(self) -> None:
        self.norms = with_sinks(self._logs, self._with_length, self._lengths, self._long, self._num_long)

    def _limit(self, limited: Callable[[Tensor, TokenNorms | None], Tensor]) -> None:
        self.mask = limited(self.mask, self.norms)
        self._valid = torch.empty_like(self.mask)

    def _sum_up(self) -> None:
        for some, part in places(self.states, torch.float64):
            x = self.states[some, part].to(self.dtype)
            finite, counts = finite_rows(x), self.mask[some, part]
            valid = self._valid[some, part] = counts & finite
            self._nonfinite += (counts & ~finite).sum()
            self._totals[some, :-1] += torch.where(valid.unsqueeze(-1), x, 0.0).sum(1, dtype=torch.float64)
            self._totals[some, -1] += valid.sum(1)
            del x

    def _entropies(self, attempt: AllOrNone) -> SequenceEntropies:
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
        for part in slices(self.states.shape[1], rows_of_a_piece(self.states.shape[2], self.dtype)):
            add_second_moment(scatter, self._directions(slice(number, number + 1), part)[0])

    def _directions(self, some: slice, part: slice) -> Tensor:
        mean = self._totals[some, :-1] / self._totals[some, -1:].clamp(min=1)
        valid = self._valid[some, part]
        x = self.states[some, part].to(self.dtype)
        # Of this part alone: a direction does not depend on the scale.
        largest = torch.where(valid, largest_of_rows(x), 0.0)
        both = torch.cat([largest, largest_of_rows(mean).to(self.dtype).unsqueeze(1)], dim=1)
        factor = into_range(both.amax(1), self.dtype)
        x, mean = x * factor[:, None, None], mean * factor.unsqueeze(1)
        rounded = mean.to(self.dtype)
        x = x - rounded.unsqueeze(1)
        x -= (mean - rounded).to(self.dtype).unsqueeze(1)
        return scaled_to_unit_length_(x.masked_fill_(~valid.unsqueeze(-1), 0.0))


def _entropy_and_trace(lower: Tensor) -> Tensor:
    trace = lower.trace()  # before the solver makes use of its memory
    return torch.stack([entropy_of_lower(lower, alpha=1.0), trace])


def agreed(prepare: Callable[[], SplitSequences], groups: Groups, device: torch.device) -> SplitSequences:
    """Return what ``prepare`` returns, if it succeeds on every rank of ``groups`` with as many sequences and features.

    Costs one device-to-host sync.

    Raises:
        Exception: What ``prepare`` raised.
        RuntimeError: If it raised on another rank.
        ValueError: If ranks differ in the number of sequences or features.
    """
    message = "another rank, which holds a part of the same sequences, failed to read it."
    with AllOrNone(device, groups, message, numbers=2) as together:
        found = prepare()
        together.numbers = [found.count, found.width]
    (least, most), (narrowest, widest) = together.ranges
    if (least, narrowest) != (most, widest):
        raise ValueError(
            "ranks that hold parts of the same sequences must have as many of them, of one width, "
            f"got {least} to {most} sequences of {narrowest} to {widest} features."
        )
    return found


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
