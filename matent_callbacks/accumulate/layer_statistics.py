"""Accumulates what one reading needs of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import MEANS, Embedding, Source
from matent_callbacks.accumulate.curvature import mean_curvature
from matent_callbacks.accumulate.documents import Discriminant, add_documents
from matent_callbacks.accumulate.embeddings import Embeddings, embeddings_at_a_time, rows_at_a_time
from matent_callbacks.accumulate.moments import Center, empty_moments
from matent_callbacks.accumulate.pieces import whole_sequences
from matent_callbacks.accumulate.pooled_tokens import Matrix, PooledTokens
from matent_callbacks.accumulate.sequence_mean import (
    SequenceEntropies,
    SequenceMean,
    empty_sequence_mean,
    mean_by_tokens,
    mean_of_sequences,
    merge_sequence_means,
    sequence_entropies,
)
from matent_callbacks.accumulate.split_sequences import Groups, SequenceParts
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states

CENTERS: dict[Source, Center] = {
    "pooled": "sequence",
    "raw": None,
    "embedding": "global",
    "raw_embedding": None,
    "between_documents": "global",
    "within_documents": "sequence",
}
"""The sources that are one set of tokens, or of vectors made of them, and what is subtracted from these."""

OF_VECTORS: frozenset[Source] = frozenset({"embedding", "raw_embedding"})
"""Those of one vector per sequence."""

OF_DOCUMENTS: frozenset[Source] = frozenset({"between_documents", "within_documents"})
"""Those that are decomposed together."""

IN_FLOAT64: frozenset[Source] = OF_DOCUMENTS | {"raw_embedding"}
"""Those whose metrics take roots or logarithms of the smallest eigenvalues, or divide by them. In float32 these would
be rounding errors. They hold few vectors, so float64 costs little."""

_OF_ENTROPIES: frozenset[Source] = frozenset({"sequence", "sequence_by_tokens"})
OF_WHOLE_SEQUENCES: frozenset[Source] = OF_VECTORS | OF_DOCUMENTS | {"curvature"}
"""Those that cannot be computed where ranks hold parts of the same sequences."""


class LayerAccumulator:
    """Accumulates those statistics of one layer that the chosen metrics need, since the last reading.

    It takes the memory of a :class:`.PooledTokens` for each source and a few numbers, and :data:`.WORK_SPACE` more
    during an update, however large the batch is.

    Args:
        sources: What to accumulate.
        max_tokens: Upper bound on the number of tokens that the masks have; the first ones count.
        dtype: Of the statistics, apart from those :data:`.IN_FLOAT64`.
        device: Where the statistics of all layers are brought together.
        embedding: Which vector stands for a sequence of tokens.
    """

    def __init__(
        self,
        sources: frozenset[Source],
        *,
        max_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device,
        embedding: Embedding = "mean",
    ) -> None:
        self.device = device
        self._embedding = embedding
        self._sources = sources
        self._max_tokens = max_tokens
        self.dtype = dtype
        self._double = torch.float32 if device.type == "mps" else torch.float64  # MPS has no other
        self.discard()

    def update(
        self, hidden_states: Tensor | None, attention_mask: Tensor | None, vectors: Tensor | None = None
    ) -> Tensor | None:
        """Add the tokens of one forward pass: ``(B, T, d)``, or ``(N, d)``.

        Sources of one vector per sequence take ``(N, d)`` as N vectors, all others as one sequence of N tokens. With
        ``(B, T, d)`` they take ``vectors`` ``(B, d')`` if given. A sequence that ``max_tokens`` cuts short has no such
        vector.

        An error in the middle, such as running out of memory, discards all that was accumulated, since it would hold
        part of a batch. Hidden states that are rejected (see below) leave it as it was.

        Returns:
            ``(B,)``: the entropy of each sequence, NaN where fewer than two tokens count. ``None`` where the sources
            have no entropy of sequences, or there is no token.

        Raises:
            TypeError: If ``hidden_states`` is not a floating point tensor.
            ValueError: If a shape is wrong, or d or d' is not that of the forward passes before.
        """
        states, given = check_hidden_states(hidden_states, attention_mask)
        mask = given
        is_one_row = hidden_states is not None and hidden_states.ndim == 2
        if is_one_row:
            vectors = hidden_states
        elif vectors is not None and len(vectors) != len(states):
            raise ValueError(f"`vectors` must be one for each of {len(states)} sequences, got {tuple(vectors.shape)}.")
        if self._max_tokens is not None:
            states, mask = self._within_budget(states, given, self._max_tokens, is_whole=attention_mask is None)
        if mask.numel() == 0:
            return None
        for source, tokens in self.tokens.items():
            of = states if vectors is None or source not in OF_VECTORS else vectors
            tokens.check_width(of.shape[-1])
        self._give(mask)
        try:
            with full_precision(states.device):
                if self.tokens.keys() & OF_VECTORS:
                    self._embed(states, mask, given[: len(mask)], vectors, is_one_row=is_one_row)
                return self._accumulate(states, mask)
        except BaseException:
            self.discard()
            raise

    def matrices(self) -> dict[Source, Matrix | Discriminant]:
        """Return what has a spectrum, by source."""
        found: dict[Source, Matrix | Discriminant] = {
            source: tokens.matrix() for source, tokens in self.tokens.items() if source not in OF_DOCUMENTS
        }
        if self.tokens.keys() & OF_DOCUMENTS:
            between, within = self.tokens["between_documents"], self.tokens["within_documents"]
            found["between_documents"] = Discriminant(between.moments(), within.moments())
        return found

    def parts(
        self,
        count: int,
        width: int,
        local: Callable[[], tuple[Tensor, Tensor | None]],
        groups: Groups,
        *,
        device: torch.device,
    ) -> SequenceParts:
        """Return this rank's parts of the sequences of one forward pass, for :meth:`update_by_parts`.

        Args:
            count: Number of sequences B.
            width: Number of features d.
            local: Returns hidden states and mask of this rank.
            groups: The groups whose ranks hold the other parts.
            device: Of the hidden states.

        Raises:
            ValueError: If d is not that of the forward passes before, or a source needs whole sequences.
        """
        if self._sources & OF_WHOLE_SEQUENCES:
            raise ValueError(
                "embeddings, curvature and lidar are of whole sequences, and the hidden states are spread over ranks."
            )
        for tokens in self.tokens.values():
            tokens.check_width(width)
        return SequenceParts(
            count,
            width,
            lambda: check_hidden_states(*local()),
            groups,
            dtype=self.dtype,
            device=device,
            sequences=bool(self.means.keys() & _OF_ENTROPIES),
        )

    def update_by_parts(self, parts: SequenceParts) -> None:
        """Add the tokens of one forward pass whose sequences are split over ranks; each of them has to call this.

        ``max_tokens`` bounds each rank separately, as it does elsewhere. An error discards all that was accumulated.
        """
        budget = self._max_tokens
        try:
            with full_precision(parts.device):
                found = parts.add_to(
                    self.tokens.get("pooled"),
                    self.tokens.get("raw"),
                    limited=lambda mask: mask if budget is None else self._first_tokens(mask, budget),
                )
                self._give(parts.counts)
                if found is not None:
                    self._add_entropies(found, parts.width)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget what was accumulated."""
        self._surely = 0
        self._counted = torch.zeros((), dtype=torch.int64, device=self.device)
        nothing = empty_moments(dtype=self.dtype, device=self.device)
        double = empty_moments(dtype=self._double, device=self.device)
        self.tokens: dict[Source, PooledTokens] = {
            source: PooledTokens(center, double if source in IN_FLOAT64 else nothing)
            for source, center in CENTERS.items()
            if source in self._sources
        }
        self.num_given = torch.zeros((), dtype=torch.int64, device=self.device)
        """``()``: tokens that the masks have in, whether they hold NaN or not."""
        of_none = empty_sequence_mean(dtype=self.dtype, device=self.device)
        self.means: dict[Source, SequenceMean] = {source: of_none for source in MEANS if source in self._sources}

    def _give(self, mask: Tensor) -> None:
        self.num_given = self.num_given + mask.sum().to(self.device)

    def _accumulate(self, states: Tensor, mask: Tensor) -> Tensor | None:
        entropy = None
        pooled, raw = self.tokens.get("pooled"), self.tokens.get("raw")
        if self.means.keys() & _OF_ENTROPIES:
            found = sequence_entropies(states, mask, center=True, normalize=True, dtype=self.dtype, pooled=pooled)
            self._add_entropies(found, states.shape[-1])
            entropy = torch.where(found.num_tokens >= 2, found.entropy, torch.nan)
        elif pooled is not None:
            pooled.update(states, mask, normalize=True, dtype=self.dtype)
        if raw is not None:
            raw.update(states, mask, normalize=False, dtype=self.dtype)
        if self.tokens.keys() & OF_DOCUMENTS:
            between, within = self.tokens["between_documents"], self.tokens["within_documents"]
            add_documents(states, mask, between=between, within=within, dtype=self._double)
        if "curvature" in self.means:
            self._merge("curvature", mean_curvature(states, mask, dtype=self.dtype))
        return entropy

    def _add_entropies(self, found: SequenceEntropies, num_features: int) -> None:
        if "sequence" in self.means:
            self._merge("sequence", mean_of_sequences(found, num_features, center=True))
        if "sequence_by_tokens" in self.means:
            self._merge("sequence_by_tokens", mean_by_tokens(found))

    def _merge(self, source: Source, batch: SequenceMean) -> None:
        # The layers of a model that is spread over several devices are brought together on one.
        home = SequenceMean(*(tensor.to(self.device) for tensor in batch))
        self.means[source] = merge_sequence_means(self.means[source], home)

    def _embed(self, states: Tensor, mask: Tensor, given: Tensor, vectors: Tensor | None, *, is_one_row: bool) -> None:
        """Add one vector for each sequence of ``(B, T, d)`` of which ``mask`` has all tokens that ``given`` has."""
        whole = mask & ~(given & ~mask).any(1, keepdim=True)
        if vectors is None:
            found = embeddings_at_a_time(states, whole, self._embedding, dtype=self.dtype)
        else:
            counts = mask[0] if is_one_row else whole.any(1)
            found = rows_at_a_time(vectors[: len(counts)], counts, dtype=self.dtype)
        for some in found:
            for source in self.tokens.keys() & OF_VECTORS:
                self._add_embeddings(source, some)
            del some

    def _add_embeddings(self, source: Source, some: Embeddings) -> None:
        tokens, vectors = self.tokens[source], some.values.unsqueeze(1)
        tokens.reserve(vectors)
        dtype = self._double if source in IN_FLOAT64 else self.dtype
        normalize = source == "embedding"
        piece = whole_sequences(vectors, some.valid.unsqueeze(1), center=False, normalize=normalize, dtype=dtype)
        found = piece.tokens
        tokens.add(piece._replace(tokens=found._replace(nonfinite=found.nonfinite + some.nonfinite)))

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
