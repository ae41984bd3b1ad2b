"""What a layer accumulates during one reading."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.moments import Center, empty_moments
from matent_callbacks.accumulate.pooled_tokens import PooledTokens
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    sequence_mean,
)
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states, prepare_tokens

CENTERS: dict[Source, Center] = {"pooled": "sequence", "raw": None}
"""The sources that are accumulated as one set of tokens, and what is subtracted from these."""


class LayerAccumulator:
    """The statistics of one layer since the last reading: those that the chosen metrics need."""

    def __init__(
        self, sources: frozenset[Source], *, max_tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens: dict[Source, PooledTokens] = {
            source: PooledTokens(center, empty_moments(dtype=dtype, device=device))
            for source, center in CENTERS.items()
            if source in sources
        }
        self.sequences = empty_sequence_mean(dtype=dtype, device=device) if "sequence" in sources else None
        self._max_tokens = max_tokens
        self._slots = 0
        self._dtype = dtype
        self.device = device

    def update(self, hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
        """Add the tokens of one forward."""
        states, mask = check_hidden_states(hidden_states, attention_mask)
        if self._max_tokens is not None:
            states, mask = self._within_budget(states, mask, self._max_tokens)
        if mask.numel() == 0:
            return
        with full_precision(states.device):
            if "pooled" in self.tokens or self.sequences is not None:
                tokens = prepare_tokens(states, mask, center=True, normalize=True, dtype=self._dtype)
                if "pooled" in self.tokens:
                    self.tokens["pooled"].add(tokens)
                if self.sequences is not None:
                    batch = sequence_mean(tokens, center=True)
                    # The layers of a model that is spread over several devices come together on one.
                    home = SequenceMean(*(tensor.to(self.device) for tensor in batch))
                    self.sequences = merge_sequence_means(self.sequences, home)
            if "raw" in self.tokens:
                raw = prepare_tokens(states, mask, center=False, normalize=False, dtype=self._dtype)
                self.tokens["raw"].add(raw)

    def _within_budget(self, states: Tensor, mask: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """The first sequences, the last of them cut short, so that no more than ``budget`` tokens count.

        By shape and not by what the mask holds, since a look into it would make the host wait for the device.
        """
        left = max(budget - self._slots, 0)
        sequences = -(-left // states.shape[1])
        states, mask = states[:sequences], mask[:sequences]
        self._slots += mask.numel()
        position = mask.flatten().cumsum(0).view_as(mask)
        return states, mask & (position <= left)
