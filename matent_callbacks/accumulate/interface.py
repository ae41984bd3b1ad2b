"""The interface of the statistics of a layer: add sequences, merge, and the states that ranks reduce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from matent_callbacks.accumulate.catalogue import Embedding, Source
from matent_callbacks.accumulate.documents import Discriminant
from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.pooled_tokens import Matrix, PooledTokens
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.accumulate.sequences import Sequences

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
    centers_sequences: ClassVar[bool] = False
    """Whether tokens that are alone in their sequence leave nothing, since its mean is subtracted."""
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
