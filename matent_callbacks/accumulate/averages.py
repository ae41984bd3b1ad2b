"""The statistics that are a mean: of one number per sequence, or of one number or vector per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.interface import State, Statistic
from matent_callbacks.accumulate.pieces import rows_of_a_piece, slices
from matent_callbacks.accumulate.pooled_tokens import check_width
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    mean_by_tokens,
    mean_of_sequences,
    merge_sequence_means,
)
from matent_callbacks.accumulate.sequences import Sequences
from matent_callbacks.functional.trajectory import counting_first, sum_of_angles


class Average(Statistic):
    """A mean of one number per sequence, or of one number or vector per token."""

    of_vector: ClassVar[bool] = False
    """Whether it is the mean of vectors."""

    @classmethod
    def of_nothing(cls, *, dtype: torch.dtype, device: torch.device) -> SequenceMean:
        """Return the mean to begin with."""
        nothing = empty_sequence_mean(dtype=dtype, device=device)
        return nothing._replace(mean=nothing.mean.new_zeros(0)) if cls.of_vector else nothing

    def _begin(self, states: Mapping[Source, State]) -> None:
        mean = states[self.sources[0]]
        assert isinstance(mean, SequenceMean)
        self.mean = mean

    def add(self, sequences: Sequences) -> None:
        self.merge(self.sources[0], self.of(sequences))

    @abstractmethod
    def of(self, sequences: Sequences) -> SequenceMean:
        """Return the mean over some sequences."""

    def merge(self, source: Source, state: State) -> None:
        assert isinstance(state, SequenceMean)
        # The layers of a model that is spread over several devices are brought together on one.
        home = SequenceMean(*(tensor.to(self.mean.mean.device) for tensor in state))
        self.mean = merge_sequence_means(self.mean, home)

    def states(self) -> dict[Source, State]:
        return {self.sources[0]: self.mean}


class SequenceEntropy(Average):
    """The entropy of the covariance of each sequence."""

    sources = ("sequence",)
    takes = (1, "sequence of 2 tokens or more")

    def of(self, sequences: Sequences) -> SequenceMean:
        return mean_of_sequences(sequences.entropies, sequences.states.shape[-1], center=True)


class SequenceEntropyByTokens(Average):
    """The same, with each sequence weighted by its number of tokens."""

    sources = ("sequence_by_tokens",)
    takes = (1, "sequence of 2 tokens or more")

    def of(self, sequences: Sequences) -> SequenceMean:
        return mean_by_tokens(sequences.entropies)


class Curvature(Average):
    """The mean angle along each sequence."""

    sources = ("curvature",)
    takes = (1, "sequence of 3 tokens or more")
    of_whole_sequences = True

    def of(self, sequences: Sequences) -> SequenceMean:
        states, dtype = sequences.states, sequences.dtype
        total = torch.zeros(len(states), dtype=dtype, device=states.device)
        number = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        order, count = counting_first(sequences.valid)
        of_each = torch.arange(len(states), device=states.device).unsqueeze(1)
        # Each angle takes three tokens, so parts share two with the next.
        for part in slices(max(states.shape[1] - 2, 0), max(1, rows_of_a_piece(states.shape[-1], dtype) - 2)):
            places = order[:, part.start : part.stop + 2]
            angles, turns = sum_of_angles(states[of_each, places].to(dtype), count - part.start)
            total += angles
            number += turns
        return _mean_where(number > 0, total / number.clamp(min=1), sequences)


class SquaredNorm(Average):
    """The squared length of each token, as it is."""

    sources = ("squared_norm",)
    needs_norms = in_float64 = True

    def of(self, sequences: Sequences) -> SequenceMean:
        assert sequences.norms is not None
        squares = (2 * sequences.norms.logs.to(self.mean.mean.dtype)).exp()
        count = sequences.valid.sum()
        total = torch.where(sequences.valid, squares, 0.0).sum()
        return SequenceMean(count, sequences.nonfinite, total / count.clamp(min=1))


class LongestToken(Average):
    """How many times as long as the geometric mean of its sequence the longest token is."""

    sources = ("longest_token",)
    needs_norms = of_whole_sequences = True

    def of(self, sequences: Sequences) -> SequenceMean:
        assert sequences.norms is not None
        norms = sequences.norms
        ratios = torch.where(norms.counts, norms.log_ratios, -torch.inf).amax(1).exp()
        return _mean_where(norms.num_tokens > 0, ratios, sequences)


class Sinks(Average):
    """The number of sinks of each sequence."""

    sources = ("sinks",)
    needs_norms = True

    def of(self, sequences: Sequences) -> SequenceMean:
        assert sequences.norms is not None
        norms = sequences.norms
        return _mean_where((norms.num_tokens > 0) & sequences.counts_here, norms.num_sinks, sequences)


class Directions(Average):
    """The directions of all tokens: their mean is the longer, the more alike they are."""

    sources = ("directions",)
    takes = (2, "token")
    of_vector = in_float64 = True

    def check_width(self, width: int) -> None:
        check_width(self.mean.mean.numel(), width)

    def of(self, sequences: Sequences) -> SequenceMean:
        total = self.mean.mean.new_zeros(sequences.states.shape[-1]).to(sequences.states.device)
        count = torch.zeros((), dtype=torch.int64, device=total.device)
        for piece in sequences.pieces(center=False, normalize=True):
            total += piece.tokens.values.sum((0, 1), dtype=total.dtype)
            # A token that is zero has no direction.
            count += (piece.tokens.values != 0).any(-1).sum()
            del piece
        return SequenceMean(count, sequences.nonfinite, total / count.clamp(min=1))


def _mean_where(defined: Tensor, numbers: Tensor, sequences: Sequences) -> SequenceMean:
    total = torch.where(defined, numbers, 0).sum()
    return SequenceMean(defined.sum(), sequences.nonfinite, total / defined.sum().clamp(min=1))
