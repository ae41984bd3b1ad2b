"""What a layer accumulates during one reading."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.moments import Center, empty_moments
from matent_callbacks.accumulate.pooled_tokens import PooledTokens
from matent_callbacks.accumulate.sequence_mean import (
    SequenceEntropies,
    SequenceMean,
    empty_sequence_mean,
    mean_of_sequences,
    merge_sequence_means,
    sequence_entropies,
)
from matent_callbacks.accumulate.split_sequences import Groups, SequenceParts
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states

CENTERS: dict[Source, Center] = {"pooled": "sequence", "raw": None}
"""The sources that are one set of tokens, and what is subtracted from these tokens."""


class LayerAccumulator:
    """The statistics of one layer since the last reading: those that the chosen metrics need.

    Its memory is that of :class:`.PooledTokens` for each source and a few numbers. While it is updated it takes
    :data:`.WORK_SPACE` more, however large the batch is.

    Args:
        sources: What to accumulate.
        max_tokens: Upper bound on the number of tokens; the first ones count.
        dtype: Of the statistics.
        device: Where the statistics of all layers come together.
    """

    def __init__(
        self, sources: frozenset[Source], *, max_tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        self._sources = sources
        self._max_tokens = max_tokens
        self._slots = 0
        self.dtype = dtype
        self._forget()

    def update(self, hidden_states: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Add the tokens of one forward pass.

        An error in the middle, such as running out of memory, frees all that was accumulated: half of a batch is no
        statistic. Hidden states that are refused, see below, leave it as it was.

        Returns:
            ``(B,)``: the entropy of each sequence, NaN where fewer than two tokens count. ``None`` where the sources
            have no ``sequence``, or there is no token.

        Raises:
            TypeError: If ``hidden_states`` is not a floating point tensor.
            ValueError: If a shape is wrong, or d is not that of the forward passes before.
        """
        states, mask = check_hidden_states(hidden_states, attention_mask)
        if self._max_tokens is not None:
            states, mask = self._within_budget(states, mask, self._max_tokens)
        if mask.numel() == 0:
            return None
        for tokens in self.tokens.values():
            tokens.check_width(states.shape[-1])
        try:
            with full_precision(states.device):
                return self._accumulate(states, mask)
        except BaseException:
            self._forget()
            raise

    def parts(
        self,
        count: int,
        width: int,
        local: Callable[[], tuple[Tensor, Tensor | None]],
        groups: Groups,
        *,
        device: torch.device,
    ) -> SequenceParts:
        """The part of each sequence that this rank has of one forward pass, for :meth:`update_by_parts`.

        Args:
            count: Number of sequences B.
            width: Number of features d.
            local: Gives hidden states and mask of this rank.
            groups: Whose ranks hold the other parts.
            device: Of the hidden states.

        Raises:
            ValueError: If d is not that of the forward passes before.
        """
        for tokens in self.tokens.values():
            tokens.check_width(width)
        return SequenceParts(
            count,
            width,
            lambda: check_hidden_states(*local()),
            groups,
            dtype=self.dtype,
            device=device,
            sequences=self.sequences is not None,
        )

    def update_by_parts(self, parts: SequenceParts) -> None:
        """Add the tokens of one forward pass whose sequences are spread over ranks; each of them has to call this.

        ``max_tokens`` is a bound for each rank, as it is without such parts. An error frees all that was accumulated.
        """
        budget = self._max_tokens
        try:
            with full_precision(parts.device):
                found = parts.add_to(
                    self.tokens.get("pooled"),
                    self.tokens.get("raw"),
                    limited=lambda mask: mask if budget is None else self._first_tokens(mask, budget),
                )
                self._merge(found, parts.width)
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        nothing = empty_moments(dtype=self.dtype, device=self.device)
        self.tokens: dict[Source, PooledTokens] = {
            source: PooledTokens(center, nothing) for source, center in CENTERS.items() if source in self._sources
        }
        of_none = empty_sequence_mean(dtype=self.dtype, device=self.device)
        self.sequences: SequenceMean | None = of_none if "sequence" in self._sources else None

    def _accumulate(self, states: Tensor, mask: Tensor) -> Tensor | None:
        entropy = None
        pooled, raw = self.tokens.get("pooled"), self.tokens.get("raw")
        if self.sequences is not None:
            found = sequence_entropies(states, mask, center=True, normalize=True, dtype=self.dtype, pooled=pooled)
            self._merge(found, states.shape[-1])
            entropy = torch.where(found.num_tokens >= 2, found.entropy, torch.nan)
        elif pooled is not None:
            pooled.update(states, mask, normalize=True, dtype=self.dtype)
        if raw is not None:
            raw.update(states, mask, normalize=False, dtype=self.dtype)
        return entropy

    def _merge(self, found: SequenceEntropies | None, num_features: int) -> None:
        if found is None or self.sequences is None:
            return
        batch = mean_of_sequences(found, num_features, center=True)
        # The layers of a model that is spread over several devices come together on one.
        home = SequenceMean(*(tensor.to(self.device) for tensor in batch))
        self.sequences = merge_sequence_means(self.sequences, home)

    def _within_budget(self, states: Tensor, mask: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """The first sequences, the last of them cut short, so that no more than ``budget`` tokens count.

        By shape and not by what the mask holds, since a look into it would make the host wait for the device.
        """
        sequences = -(-max(budget - self._slots, 0) // states.shape[1])
        return states[:sequences], self._first_tokens(mask[:sequences], budget)

    def _first_tokens(self, mask: Tensor, budget: int) -> Tensor:
        left = max(budget - self._slots, 0)
        self._slots += mask.numel()
        position = mask.flatten().cumsum(0).view_as(mask)
        return mask & (position <= left)
