"""What every statistic is given: some sequences of a batch, whose tokens are checked, centred and scaled once for all.

A batch is split into groups of sequences that fit into the work space (:mod:`.pieces`), and each statistic adds one
group after the other. A sequence that is longer than the work space is a group of its own. Sequences of which several
ranks hold parts are one group, see :mod:`.split_sequences`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.pieces import LongSequence, Piece, rows_of_a_piece, slices
from matent_callbacks.accumulate.pooled_tokens import entropy_of_lower
from matent_callbacks.accumulate.symmetric import lower_triangle
from matent_callbacks.functional._tokens import Tokens, finite_rows, prepare_tokens
from matent_callbacks.functional.entropy import entropy_of_matrix
from matent_callbacks.functional.sinks import TokenNorms, log_norms
from matent_callbacks.functional.spectrum import second_moment

_Result = TypeVar("_Result")


class SequenceEntropies(NamedTuple):
    """Entropies of some sequences."""

    entropy: Tensor
    """``(b,)``, nats; arbitrary for a sequence with too few tokens to have a covariance."""
    num_tokens: Tensor
    """``(b,)`` int64: tokens that are neither masked nor left out."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    trace: Tensor
    """``(b,)``: the sum of the squared lengths of the tokens; for unit lengths, how many do not equal their mean."""


class Vectors(NamedTuple):
    """Vectors that stand for sequences, as the model itself has made them."""

    values: Tensor
    """``(n, d')``."""
    valid: Tensor
    """``(n,)`` bool: those that count."""


class Sequences(ABC):
    """Some sequences ``(b, T, d)`` of a batch.

    Args:
        states: ``(b, T, d)``, as the model has made them.
        mask: ``(b, T)`` bool: the tokens that count, whether they hold NaN or not.
        dtype: Of the statistics.
        whole: ``(b,)`` bool: sequences of which no token is left out by a limit; ``None``: all are whole.
        vectors: What stands for the sequences, if it is not to be made of their tokens.
        has_entropies: Whether :meth:`entropies` will be asked for, which then shares with the pooled covariance what
            both need.
        norms: The lengths of the tokens, if a statistic asks for them.
    """

    def __init__(
        self,
        states: Tensor,
        mask: Tensor,
        *,
        dtype: torch.dtype,
        whole: Tensor | None = None,
        vectors: Vectors | None = None,
        has_entropies: bool = False,
        norms: TokenNorms | None = None,
    ) -> None:
        self.states = states
        self.mask = mask
        self.dtype = dtype
        self.whole = whole
        self.vectors = vectors
        self.has_entropies = has_entropies
        self.norms = norms
        self._shared: dict[Callable[..., Any], Any] = {}

    def once(self, compute: Callable[[Sequences], _Result]) -> _Result:
        """Return ``compute(self)``, which several statistics share; it is computed when it is first asked for."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        return cast(_Result, self._shared[compute])

    @property
    def mask_of_whole(self) -> Tensor:
        """``(b, T)`` bool: the mask without the sequences that a limit cuts short."""
        return self.mask if self.whole is None else self.mask & self.whole.unsqueeze(1)

    @property
    @abstractmethod
    def valid(self) -> Tensor:
        """``(b, T)`` bool: the tokens that count and hold neither NaN nor Inf."""

    @property
    @abstractmethod
    def nonfinite(self) -> Tensor:
        """``()`` int64: tokens that are left out because of NaN or Inf."""

    @abstractmethod
    def pieces(self, *, center: bool, normalize: bool) -> Iterator[Piece]:
        """Yield the tokens, centred by the mean of their sequence and scaled to unit length if asked for.

        A caller should drop its reference to a piece before it asks for the next one, or both are in memory at once.
        """

    @cached_property
    def entropies(self) -> SequenceEntropies:
        """The entropy of each sequence, from its centred tokens at unit length."""
        return self.entropies_of(center=True, normalize=True, alpha=1.0)

    @abstractmethod
    def entropies_of(self, *, center: bool, normalize: bool, alpha: float) -> SequenceEntropies:
        """Compute the Rényi entropy of order ``alpha`` of each sequence."""

    @property
    def counts_here(self) -> bool:
        """Whether the sequences are counted on this rank: of those that share them, one does."""
        return True

    def moments(self) -> Moments | None:
        """Moments of the centred tokens at unit length, where the entropies need them as well; elsewhere ``None``."""
        return None


class ShortSequences(Sequences):
    """Sequences that fit into the work space together."""

    _directions: Tokens | None = None

    @cached_property
    def _counting(self) -> tuple[Tensor, Tensor]:
        finite = finite_rows(_wide(self.states, self.dtype))
        return self.mask & finite, (self.mask & ~finite).sum()

    @property
    def valid(self) -> Tensor:
        return self._counting[0]

    @property
    def nonfinite(self) -> Tensor:
        return self._counting[1]

    def pieces(self, *, center: bool, normalize: bool) -> Iterator[Piece]:
        tokens = self._tokens(center=center, normalize=normalize)
        yield Piece(tokens, self._num_sequences)

    def entropies_of(self, *, center: bool, normalize: bool, alpha: float) -> SequenceEntropies:
        tokens = self._tokens(center=center, normalize=normalize, alone=not normalize)
        matrix = second_moment(tokens)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        return SequenceEntropies(entropy_of_matrix(matrix, alpha=alpha), tokens.valid.sum(-1), tokens.nonfinite, trace)

    @cached_property
    def _num_sequences(self) -> Tensor:
        return self.valid.any(-1).sum()

    def _tokens(self, *, center: bool, normalize: bool, alone: bool = False) -> Tokens:
        if self._directions is not None and center and normalize:
            return self._directions
        self._directions = None  # before others take as much memory
        if "_counting" in vars(self) and not (center or normalize or alone):
            values = torch.where(self.valid.unsqueeze(-1), _wide(self.states, self.dtype), 0.0).to(self.dtype)
            return Tokens(values, self.valid, self.nonfinite)
        found = prepare_tokens(
            self.states, self.mask, center=center, normalize=normalize, dtype=self.dtype, alone=alone
        )
        self._counting = (found.valid, found.nonfinite)
        if self.has_entropies and center and normalize:
            self._directions = found
        return found


class LongSequences(Sequences):
    """One sequence that is longer than the work space, and is read part by part."""

    _first: LongSequence | None = None
    _moments: Moments | None = None

    @property
    def valid(self) -> Tensor:
        return self._counting.valid.unsqueeze(0)

    @property
    def nonfinite(self) -> Tensor:
        return self._counting.nonfinite

    def pieces(self, *, center: bool, normalize: bool) -> Iterator[Piece]:
        yield from self._as(center=center, normalize=normalize).pieces()

    def moments(self) -> Moments | None:
        if self.has_entropies and not self._directions.has_fewer_tokens_than_features:
            self._moments = self._moments or self._directions.moments()
        return self._moments

    def entropies_of(self, *, center: bool, normalize: bool, alpha: float) -> SequenceEntropies:
        sequence = self._as(center=center, normalize=normalize, alone=not normalize)
        if sequence.has_fewer_tokens_than_features:
            lower = sequence.gram()
        else:
            moments, self._moments = self._moments or sequence.moments(), None
            lower = lower_triangle(moments.scatter)
            del moments  # before the solver makes a copy of the matrix
        trace = lower.trace()
        entropy = entropy_of_lower(lower, alpha=alpha)
        count = sequence.valid.sum().unsqueeze(0)
        return SequenceEntropies(entropy.unsqueeze(0), count, sequence.nonfinite, trace.unsqueeze(0))

    @cached_property
    def _directions(self) -> LongSequence:
        return self._made(center=True, normalize=True)

    @property
    def _counting(self) -> LongSequence:
        return self._first or self._made(center=False, normalize=False)

    def _as(self, *, center: bool, normalize: bool, alone: bool = False) -> LongSequence:
        if center and normalize:
            return self._directions
        return self._made(center=center, normalize=normalize, alone=alone)

    def _made(self, *, center: bool, normalize: bool, alone: bool = False) -> LongSequence:
        made = LongSequence(
            self.states[0],
            self.mask[0],
            center=center,
            normalize=normalize,
            dtype=self.dtype,
            alone=alone,
            largest=None if self._first is None else self._first.largest,
        )
        self._first = self._first or made
        return made


def in_groups(
    states: Tensor,
    mask: Tensor,
    *,
    dtype: torch.dtype,
    whole: Tensor | None = None,
    vectors: Vectors | None = None,
    has_entropies: bool = False,
    norms: TokenNorms | None = None,
) -> Iterator[Sequences]:
    """Split ``(B, T, d)`` into groups that fit into the work space; the arguments are those of :class:`Sequences`."""
    size, length, width = states.shape
    rows = rows_of_a_piece(width, dtype)
    kind = LongSequences if length > rows and size else ShortSequences
    one_each = vectors is not None and len(vectors.values) == size
    for some in slices(size, max(1, rows // max(1, length))):
        own = vectors if vectors is None or not one_each else Vectors(*(tensor[some] for tensor in vectors))
        yield kind(
            states[some],
            mask[some],
            dtype=dtype,
            whole=None if whole is None else whole[some],
            vectors=own,
            has_entropies=has_entropies,
            norms=None if norms is None else TokenNorms(*(tensor[some] for tensor in norms)),
        )


def places(states: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Yield slices of sequences and of their tokens ``(B, T, d)`` that fit into the work space."""
    count, length, width = states.shape
    rows = rows_of_a_piece(width, dtype)
    for some in slices(count, max(1, rows // max(1, length))):
        for part in slices(length, rows):
            yield some, part


def log_norms_in_pieces(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithms ``(B, T)`` of the lengths of tokens."""
    wide = torch.promote_types(states.dtype, dtype)
    if len(parts := list(places(states, dtype))) == 1:
        return log_norms(states, wide)
    logs = torch.empty(states.shape[:-1], dtype=wide, device=states.device)
    for part in parts:
        logs[part] = log_norms(states[part], wide)
    return logs


def _wide(states: Tensor, dtype: torch.dtype) -> Tensor:
    # float64 may be out of the range of float32.
    return states if states.dtype == torch.float64 else states.to(dtype)
