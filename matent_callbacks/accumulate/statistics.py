"""The statistics of a layer, which all have one interface: add sequences, merge, and the states that ranks reduce.

A new one is a class here, listed in ``_KINDS``. Its metrics are rows of :data:`.CATALOGUE`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Embedding, Source
from matent_callbacks.accumulate.documents import VIEWS, Discriminant, views_at_a_time
from matent_callbacks.accumulate.embeddings import embeddings
from matent_callbacks.accumulate.moments import Center, Moments
from matent_callbacks.accumulate.pieces import Piece, rows_of_a_piece, slices
from matent_callbacks.accumulate.pooled_tokens import Matrix, PooledTokens, check_width
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    mean_by_tokens,
    mean_of_sequences,
    merge_sequence_means,
)
from matent_callbacks.accumulate.sequences import Sequences
from matent_callbacks.functional._tokens import prepare_tokens
from matent_callbacks.functional.trajectory import counting_first, sum_of_angles

State = Moments | SequenceMean
"""What a statistic knows of the tokens that it has seen. States of one source merge, over batches and over ranks."""


class Settings(NamedTuple):
    """What is asked of the statistics of a layer."""

    wanted: frozenset[Source]
    """The sources that metrics are computed from: a class that keeps several may leave others out."""
    embedding: Embedding
    """Which vector stands for a sequence."""


class Statistic(ABC):
    """One statistic of the tokens of a layer.

    Args:
        states: What it begins with, for each source that it keeps.
        settings: What is asked of it.
    """

    sources: ClassVar[tuple[Source, ...]]
    """The names of what it keeps. The first is that of the statistic."""
    takes: ClassVar[tuple[int, str]] = (1, "token")
    """How many of what its metrics take."""
    fewest: ClassVar[int] = 1
    """How many tokens, or vectors, have a covariance: two where the mean of all is subtracted."""
    of_whole_sequences: ClassVar[bool] = False
    """Whether it cannot be computed where ranks hold parts of the same sequences."""
    of_vectors: ClassVar[bool] = False
    """Whether it is computed from one vector per sequence."""
    derived: ClassVar[tuple[Source, ...]] = ()
    """Further names of what is decomposed, which is computed from what it keeps."""
    needs_norms: ClassVar[bool] = False
    """Whether it is computed from the lengths of the tokens."""
    in_float64: ClassVar[bool] = False
    """Whether its metrics take roots or logarithms of the smallest eigenvalues, or divide by them. In float32 these
    would be rounding errors. Such statistics hold few vectors, so float64 costs little."""

    def __init__(self, states: Mapping[Source, State], settings: Settings) -> None:
        self.settings = settings
        self._begin(states)

    @abstractmethod
    def _begin(self, states: Mapping[Source, State]) -> None: ...

    @abstractmethod
    def add(self, sequences: Sequences) -> None:
        """Add some sequences. To be called with autocast and TF32 switched off."""

    @abstractmethod
    def merge(self, source: Source, state: State) -> None:
        """Add what another statistic of the same class has seen."""

    @abstractmethod
    def states(self) -> dict[Source, State]:
        """Return what was accumulated."""

    def tokens(self) -> dict[Source, PooledTokens]:
        """Return what has a spectrum."""
        return {}

    def check_width(self, width: int) -> None:
        """Raise ``ValueError`` if tokens with another number of features were accumulated before."""
        for tokens in self.tokens().values():
            tokens.check_width(width)

    @property
    def decomposed(self) -> tuple[Source, ...]:
        """The sources that :meth:`matrix` takes, of those that are wanted."""
        return tuple(source for source in (*self.tokens(), *self.derived) if source in self.settings.wanted)

    def matrix(self, source: Source) -> Matrix | Discriminant:
        """Return what is decomposed."""
        return self.tokens()[source].matrix()


class Covariance(Statistic):
    """One covariance of all tokens, or of vectors that are made of them."""

    center: ClassVar[Center]
    normalize: ClassVar[bool]

    def _begin(self, states: Mapping[Source, State]) -> None:
        self._tokens = _pooled(self.center, states[self.sources[0]])

    def add(self, sequences: Sequences) -> None:
        self._tokens.update(sequences, normalize=self.normalize)

    def merge(self, source: Source, state: State) -> None:
        assert isinstance(state, Moments)
        self._tokens.add_moments(state)

    def states(self) -> dict[Source, State]:
        return {self.sources[0]: self._tokens.moments()}

    def tokens(self) -> dict[Source, PooledTokens]:
        return {self.sources[0]: self._tokens}


class Pooled(Covariance):
    """One covariance of all tokens, each centred by the mean of its sequence and scaled to unit length."""

    sources, center, normalize = ("pooled",), "sequence", True
    derived = ("correlation",)

    def matrix(self, source: Source) -> Matrix | Discriminant:
        return self._tokens.matrix(as_correlation=source == "correlation")


class Raw(Covariance):
    """One covariance of all tokens as they are."""

    sources, center, normalize = ("raw",), None, False


class EmbeddingCovariance(Covariance):
    """One covariance of one vector per sequence, each scaled to unit length, centred by the mean of all."""

    sources, normalize = ("embedding",), True
    center: ClassVar[Center] = "global"
    takes, fewest = (2, "sequence"), 2
    of_whole_sequences = of_vectors = True

    def add(self, sequences: Sequences) -> None:
        for some in embeddings(sequences, self.settings.embedding):
            vectors = some.values.unsqueeze(1)
            piece = _prepared(vectors, some.valid.unsqueeze(1), self._tokens, center=False, normalize=self.normalize)
            found = piece.tokens
            self._tokens.add(piece._replace(tokens=found._replace(nonfinite=found.nonfinite + some.nonfinite)))
            del some, vectors, piece, found


class RawEmbeddings(EmbeddingCovariance):
    """One covariance of one vector per sequence, as they are."""

    sources, center, normalize = ("raw_embedding",), None, False
    takes, fewest = (1, "sequence"), 1
    in_float64 = True


class CentredEmbeddings(EmbeddingCovariance):
    """One covariance of one vector per sequence, as they are but for the mean of all."""

    sources, normalize = ("embedding_covariance",), False
    in_float64 = True


class Documents(Statistic):
    """The covariance of the means of documents (sequences), relative to that of their parts about these means."""

    sources = ("between_documents", "within_documents")

    takes, fewest = (2, f"sequence of {VIEWS} tokens or more"), 2
    of_whole_sequences = in_float64 = True

    def _begin(self, states: Mapping[Source, State]) -> None:
        # In this order over ranks, too: one rank owns both.
        self._within = _pooled("sequence", states["within_documents"])
        self._between = _pooled("global", states["between_documents"])

    def add(self, sequences: Sequences) -> None:
        for views, counts, nonfinite in views_at_a_time(sequences, self._between.dtype):
            valid = counts.unsqueeze(1)
            for tokens, values, center in (
                (self._within, views, True),
                (self._between, views.mean(1, keepdim=True), False),
            ):
                piece = _prepared(values, valid.expand(values.shape[:-1]), tokens, center=center, normalize=False)
                tokens.add(piece._replace(tokens=piece.tokens._replace(nonfinite=nonfinite)))
                del piece
            del views

    def merge(self, source: Source, state: State) -> None:
        assert isinstance(state, Moments)
        self.tokens()[source].add_moments(state)

    def states(self) -> dict[Source, State]:
        return {source: tokens.moments() for source, tokens in self.tokens().items()}

    def tokens(self) -> dict[Source, PooledTokens]:
        return {"within_documents": self._within, "between_documents": self._between}

    @property
    def decomposed(self) -> tuple[Source, ...]:
        return ("between_documents",)

    def matrix(self, source: Source) -> Matrix | Discriminant:
        return Discriminant(self._between.moments(), self._within.moments())


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


# Those of centred tokens at unit length come first: they share them.
_KINDS = (
    Pooled,
    SequenceEntropy,
    SequenceEntropyByTokens,
    Raw,
    EmbeddingCovariance,
    RawEmbeddings,
    CentredEmbeddings,
    Documents,
    Curvature,
    SquaredNorm,
    LongestToken,
    Sinks,
    Directions,
)
STATISTICS: dict[Source, type[Statistic]] = {
    source: kind for kind in _KINDS for source in (*kind.sources, *kind.derived)
}
"""The class that keeps each source."""

OF_VECTORS = frozenset(source for source, kind in STATISTICS.items() if kind.of_vectors)
OF_WHOLE_SEQUENCES = frozenset(source for source, kind in STATISTICS.items() if kind.of_whole_sequences)


def _pooled(center: Center, state: State) -> PooledTokens:
    assert isinstance(state, Moments)
    return PooledTokens(center, state)


def _prepared(values: Tensor, valid: Tensor, tokens: PooledTokens, *, center: bool, normalize: bool) -> Piece:
    """Reserve room for rows that are made of tokens, and prepare them as tokens are."""
    tokens.reserve(values)
    prepared = prepare_tokens(values, valid, center=center, normalize=normalize, dtype=tokens.dtype)
    return Piece(prepared, prepared.valid.any(-1).sum())
