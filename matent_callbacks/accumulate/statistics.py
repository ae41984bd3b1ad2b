"""The statistics of a layer: those that are covariances, and the table of all, also of those that are means.

A new one is a class here or in :mod:`.averages`, listed in ``_KINDS``. Its metrics are rows of :data:`.CATALOGUE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from matent_callbacks.accumulate.averages import (
    Curvature,
    Directions,
    LongestToken,
    SequenceEntropy,
    SequenceEntropyByTokens,
    Sinks,
    SquaredNorm,
)
from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.documents import VIEWS, Discriminant, views_at_a_time
from matent_callbacks.accumulate.embeddings import embeddings
from matent_callbacks.accumulate.interface import State, Statistic
from matent_callbacks.accumulate.moments import Center, Moments
from matent_callbacks.accumulate.pieces import Piece
from matent_callbacks.accumulate.pooled_tokens import Matrix, PooledTokens
from matent_callbacks.accumulate.sequences import Sequences
from matent_callbacks.functional._tokens import prepare_tokens


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
    takes, fewest, centers_sequences = (2, "token of one sequence"), 2, True
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
