"""Accumulates what one reading needs of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from matent_callbacks.accumulate.averages import Average
from matent_callbacks.accumulate.catalogue import Embedding, Source, sources_of
from matent_callbacks.accumulate.interface import Settings, State, Statistic
from matent_callbacks.accumulate.moments import empty_moments
from matent_callbacks.accumulate.pooled_tokens import PooledTokens
from matent_callbacks.accumulate.probe_tokens import ProbeTokens
from matent_callbacks.accumulate.sequences import Sequences, Vectors, in_groups, log_norms_in_pieces
from matent_callbacks.accumulate.split_sequences import Groups, SplitSequences
from matent_callbacks.accumulate.statistics import OF_VECTORS, OF_WHOLE_SEQUENCES, STATISTICS
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states
from matent_callbacks.functional.sinks import TokenNorms, may_have_sinks, token_norms

__all__ = ["OF_VECTORS", "LayerAccumulator", "check_split"]

_OF_ENTROPIES: frozenset[Source] = frozenset({"sequence", "sequence_by_tokens"})


class LayerAccumulator:
    """Accumulates those statistics of one layer that the chosen metrics need, since the last reading.

    It takes the memory of a :class:`.PooledTokens` for each covariance and a few numbers, and :data:`.WORK_SPACE` more
    during an update, however large the batch is.

    Args:
        sources: What to accumulate.
        max_tokens: Upper bound on the number of tokens that the masks have; the first ones count.
        dtype: Of the statistics, apart from those that are kept in float64.
        device: Where the statistics of all layers are brought together.
        embedding: Which vector stands for a sequence of tokens.
        exclude_sinks: Leave out attention sinks, see :func:`.sink_tokens`.

    Raises:
        ValueError: If ``max_tokens`` is below 2, or ``dtype`` is another.
    """

    def __init__(
        self,
        sources: frozenset[Source],
        *,
        max_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device,
        embedding: Embedding = "mean",
        exclude_sinks: bool = False,
    ) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"`max_tokens` must be at least 2 or None, got {max_tokens}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        self.device = device
        self.dtype = dtype
        self._sources = sources
        self._max_tokens = max_tokens
        self._settings = Settings(sources, embedding)
        self._kinds = tuple(dict.fromkeys(kind for source, kind in STATISTICS.items() if source in sources))
        self._has_entropies = bool(sources & _OF_ENTROPIES)
        self._exclude_sinks = exclude_sinks
        self._logs_norms = any(kind.needs_norms for kind in self._kinds)
        double = torch.float32 if device.type == "mps" else torch.float64  # MPS has no other
        self._zero = torch.zeros((), dtype=torch.int64, device=device)
        by_dtype = {d: empty_moments(dtype=d, device=device) for d in (dtype, double)}
        self._start: dict[Source, State] = {}
        for source, kind in STATISTICS.items():
            own = double if kind.in_float64 else dtype
            if issubclass(kind, Average):
                self._start[source] = kind.of_nothing(dtype=own, device=device)
            else:
                self._start[source] = by_dtype[own]
        self._no_sinks = torch.zeros(2, dtype=double, device=device)
        self.probe_tokens: ProbeTokens | None = None
        """What keeps tokens to compare with a reference. ``max_tokens`` does not bound these."""
        self.discard()

    def discard(self) -> None:
        """Forget what was accumulated."""
        self._surely = 0
        self._counted = self._zero
        self.num_given = self._zero
        """``()``: tokens that the masks have in, whether they hold NaN or not, without sinks that are left out."""
        self.sinks = self._no_sinks
        """``(2,)``: sinks that were left out, and the sum of the logarithms of how many times as long as others."""
        self.statistics: list[Statistic] = [kind(self._start, self._settings) for kind in self._kinds]
        if self.probe_tokens is not None:
            self.probe_tokens.discard()

    def empty(self) -> LayerAccumulator:
        """Return one for another layer, which has seen nothing."""
        other = copy.copy(self)
        other.probe_tokens = None
        other.discard()
        return other

    @property
    def tokens(self) -> dict[Source, PooledTokens]:
        """What has a spectrum, by source."""
        return {source: tokens for statistic in self.statistics for source, tokens in statistic.tokens().items()}

    def states(self) -> dict[Source, State]:
        """Return what was accumulated, by source."""
        return {source: state for statistic in self.statistics for source, state in statistic.states().items()}

    def merge(self, states: Mapping[Source, State]) -> None:
        """Add what others have accumulated of this layer."""
        for statistic in self.statistics:
            for source in statistic.states().keys() & states.keys():
                statistic.merge(source, states[source])

    def update(
        self, hidden_states: Tensor | None, attention_mask: Tensor | None, vectors: Tensor | None = None
    ) -> Tensor | None:
        """Add the tokens of one forward pass: ``(B, T, d)``, or ``(N, d)``.

        Statistics of one vector per sequence take ``(N, d)`` as N vectors, all others as one sequence of N tokens. With
        ``(B, T, d)`` they take ``vectors`` ``(B, d')`` if given. A sequence that ``max_tokens`` cuts short has no such
        vector.

        An error in the middle, such as running out of memory, discards all that was accumulated, since it would hold
        part of a batch. Hidden states that are rejected (see below) leave it as it was.

        Returns:
            ``(B,)``: the entropy of each sequence, NaN where fewer than two tokens count. ``None`` where the statistics
            have no entropy of sequences, or there is no token.

        Raises:
            TypeError: If ``hidden_states`` is not a floating point tensor.
            ValueError: If a shape is wrong, or d or d' is not that of the forward passes before.
        """
        states, unmasked = check_hidden_states(hidden_states, attention_mask)
        is_one_row = hidden_states is not None and hidden_states.ndim == 2
        if is_one_row:
            vectors = hidden_states
        elif vectors is not None and len(vectors) != len(states):
            raise ValueError(f"`vectors` must be one for each of {len(states)} sequences, got {tuple(vectors.shape)}.")
        # What counts is decided here, once for all statistics.
        reads_tokens = vectors is None or not self._sources <= OF_VECTORS
        norms = self._norms(states, unmasked) if reads_tokens else None
        mask = given = self._without_sinks(unmasked, norms)
        if self.probe_tokens is not None:
            self.probe_tokens.add(states, unmasked, given)
        whole = None
        if self._max_tokens is not None:
            is_whole = attention_mask is None and norms is None
            states, mask = self._within_budget(states, given, self._max_tokens, is_whole=is_whole)
            whole = ~(given[: len(mask)] & ~mask).any(1)
        if mask.numel() == 0:
            return None
        self._check_width(states.shape[-1], states.shape[-1] if vectors is None else vectors.shape[-1])
        standing = None
        if vectors is not None and self._sources & OF_VECTORS:
            # A vector that stands for a sequence is no token that others attend to, however long it is.
            counts = mask | (unmasked & ~given)[: len(mask)]
            counts = counts if whole is None else counts & whole.unsqueeze(1)
            counts = counts[0] if is_one_row else counts.any(1)
            standing = Vectors(vectors[: len(counts)], counts)
        self._give(mask)
        groups = in_groups(
            states,
            mask,
            dtype=self.dtype,
            whole=whole,
            vectors=standing,
            has_entropies=self._has_entropies,
            norms=norms if self._logs_norms else None,
        )
        entropies = []
        try:
            with full_precision(states.device):
                for sequences in groups:
                    self._add(sequences)
                    if self._has_entropies:
                        found = sequences.entropies
                        entropies.append(torch.where(found.num_tokens >= 2, found.entropy, torch.nan))
        except BaseException:
            self.discard()
            raise
        return torch.cat(entropies) if entropies else None

    def split_sequences(
        self,
        count: int,
        width: int,
        local: Callable[[], tuple[Tensor, Tensor | None]],
        groups: Groups,
        *,
        device: torch.device,
    ) -> SplitSequences:
        """Return this rank's parts of the sequences of one forward pass, for :meth:`update_split`.

        Args:
            count: Number of sequences B.
            width: Number of features d.
            local: Returns hidden states and mask of this rank.
            groups: The groups whose ranks hold the other parts.
            device: Of the hidden states.

        Raises:
            ValueError: If d is not that of the forward passes before, or a statistic needs whole sequences.
        """
        if self._sources & OF_WHOLE_SEQUENCES:
            raise ValueError(
                "embeddings, curvature and lidar are of whole sequences, and the hidden states are spread over ranks."
            )
        self._check_width(width, width)
        return SplitSequences(
            count,
            width,
            lambda: check_hidden_states(*local()),
            groups,
            dtype=self.dtype,
            device=device,
            has_entropies=self._has_entropies,
            has_norms=self._exclude_sinks or self._logs_norms,
        )

    def update_split(self, sequences: SplitSequences) -> None:
        """Add the tokens of one forward pass whose sequences are split over ranks; each of them has to call this.

        ``max_tokens`` bounds each rank separately, as it does elsewhere. An error discards all that was accumulated.
        """

        def limited(mask: Tensor, norms: TokenNorms | None) -> Tensor:
            unmasked, mask = mask, self._without_sinks(mask, norms)
            if self.probe_tokens is not None:
                self.probe_tokens.add(sequences.states, unmasked, mask, is_split=True)
            return mask if self._max_tokens is None else self._first_tokens(mask, self._max_tokens)

        try:
            with full_precision(sequences.device):
                sequences.exchange(limited)
                self._give(sequences.mask)
                self._add(sequences)
        except BaseException:
            self.discard()
            raise

    def _add(self, sequences: Sequences) -> None:
        for statistic in self.statistics:
            statistic.add(sequences)

    def _norms(self, states: Tensor, mask: Tensor) -> TokenNorms | None:
        """Return the lengths of the tokens, if they are asked for or there may be a sink."""
        if not (self._exclude_sinks or self._logs_norms) or not mask.numel():
            return None
        logs = log_norms_in_pieces(states, self.dtype)
        # On the CPU, where a look at a value costs nothing, most layers are done with here.
        if not self._logs_norms and logs.device.type == "cpu" and not may_have_sinks(logs):
            return None
        return token_norms(logs, mask)

    def _without_sinks(self, mask: Tensor, norms: TokenNorms | None) -> Tensor:
        if norms is None or not self._exclude_sinks:
            return mask
        number, ratios = norms.sinks.sum(), torch.where(norms.sinks, norms.log_ratios, 0.0).sum()
        self.sinks = self.sinks + torch.stack([number, ratios]).to(self.sinks)
        return mask & ~norms.sinks

    def _check_width(self, width: int, width_of_vectors: int) -> None:
        for statistic in self.statistics:
            statistic.check_width(width_of_vectors if statistic.of_vectors else width)

    def _give(self, mask: Tensor) -> None:
        self.num_given = self.num_given + mask.sum().to(self.device)

    def _within_budget(self, states: Tensor, mask: Tensor, budget: int, *, is_whole: bool) -> tuple[Tensor, Tensor]:
        """Keep the first ``budget`` tokens that the mask has, those with NaN or Inf included.

        How many there were before is only known on the device, and looking would cost a device-to-host sync. Without a
        mask (``is_whole``) shapes tell it: sequences that certainly are beyond the budget are cut off.
        """
        if self.device.type == "cpu":
            self._surely = int(self._counted)
        left = max(budget - self._surely, 0)
        if is_whole:
            sequences = -(-left // states.shape[1])
            self._surely += mask.numel()
        else:
            sequences = len(states) if left else 0
        return states[:sequences], self._first_tokens(mask, budget)[:sequences]

    def _first_tokens(self, mask: Tensor, budget: int) -> Tensor:
        position = mask.flatten().cumsum(0).view_as(mask)
        before = self._counted.to(mask.device)
        self._counted = (before + mask.sum()).to(self.device)
        return mask & (position <= budget - before)


def check_split(metrics: Iterable[str]) -> None:
    """Raise ``ValueError`` if one of ``metrics`` cannot be computed where ranks hold parts of sequences."""
    for name in metrics:
        if sources_of([name]) & OF_WHOLE_SEQUENCES:
            what = "is of whole sequences, and there is a `context_group`"
            raise ValueError(f"`metrics` asks for {name!r}, which {what}.")
