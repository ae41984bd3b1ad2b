"""What a layer accumulates during one reading."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks._catalogue import Source
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import Tokens, check_hidden_states, prepare_tokens
from matent_callbacks.functional.moments import (
    Moments,
    covariance,
    empty_moments,
    merge_moments,
    token_moments,
    token_moments_about_origin,
)
from matent_callbacks.functional.sequences import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    sequence_mean,
)


class LayerAccumulator:
    """The statistics of one layer since the last reading: those that the chosen metrics need."""

    def __init__(
        self, sources: frozenset[Source], *, max_tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        kinds: tuple[Source, ...] = ("pooled", "raw")
        self.tokens: dict[Source, PooledTokens] = {
            kind: PooledTokens(kind, dtype, device) for kind in kinds if kind in sources
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


class Matrix(NamedTuple):
    """What is decomposed of one layer: its non-zero eigenvalues are those of the covariance of the tokens."""

    matrix: Tensor
    """``(k, k)``: covariance, or Gram matrix of fewer tokens than features."""
    num_features: int
    """d; 0 where no token was seen."""
    num_tokens: Tensor
    """``()``."""
    num_nonfinite: Tensor
    """``()``."""

    def to_cpu(self) -> Matrix:
        """All of it in the host's memory."""
        return Matrix(self.matrix.cpu(), self.num_features, self.num_tokens.cpu(), self.num_nonfinite.cpu())


class PooledTokens:
    """All tokens of one source: themselves while they are fewer than d, their moments from then on.

    Either way no more than d^2 numbers are kept. The Gram matrix of N tokens costs N^2 d to make and N^3 to decompose
    where the covariance costs N d^2 and d^3.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._moments = empty_moments(0, dtype=dtype, device=device)
        self._kept: list[Tokens] = []
        self._num_kept = 0
        self._device = device

    def add(self, tokens: Tokens) -> None:
        """Add a batch; an error leaves what was there."""
        width = tokens.values.shape[-1]
        if self._num_features not in (0, width):
            raise ValueError(f"it had {self._num_features} features before and has {width} now.")
        # By shape: how many of them count is known on the device only.
        slots = tokens.valid.numel()
        if self._moments.mean.shape[0] == 0 and self._num_kept + slots <= width:
            self._kept.append(tokens)
            self._num_kept += slots
            return
        self._merge_kept()
        self._merge(self._moments_of(tokens))

    def add_moments(self, moments: Moments) -> None:
        """Add what :meth:`moments` of another gave."""
        self._merge_kept()
        self._merge(moments)

    def moments(self) -> Moments:
        """Of all tokens; with d = 0 while none was seen."""
        self._merge_kept()
        return self._moments

    def matrix(self) -> Matrix:
        """The smaller of Gram matrix and covariance."""
        if not self._kept:
            return moments_matrix(self._moments, self._source)
        z = torch.cat([tokens.values.flatten(0, 1).to(self._device) for tokens in self._kept])
        # As in `covariance`: the mean of tokens that were not centred would wipe out the small eigenvalues.
        z = z.double() if self._source == "raw" and z.device.type != "mps" else z
        valid = torch.stack([tokens.valid.sum().to(self._device) for tokens in self._kept])
        nonfinite = torch.stack([tokens.nonfinite.to(self._device) for tokens in self._kept])
        with full_precision(z.device):
            return Matrix(z @ z.T, z.shape[1], valid.sum(), nonfinite.sum())

    @property
    def _num_features(self) -> int:
        return self._kept[0].values.shape[-1] if self._kept else self._moments.mean.shape[0]

    def _merge_kept(self) -> None:
        kept, self._kept, self._num_kept = self._kept, [], 0
        for tokens in kept:
            self._merge(self._moments_of(tokens))

    def _moments_of(self, tokens: Tokens) -> Moments:
        of_batch = token_moments if self._source == "raw" else token_moments_about_origin
        with full_precision(tokens.values.device):
            return Moments(*(tensor.to(self._device) for tensor in of_batch(tokens)))

    def _merge(self, moments: Moments) -> None:
        self._moments = merge_moments(self._moments, moments) if self._moments.mean.shape[0] else moments


def moments_matrix(moments: Moments, source: Source) -> Matrix:
    """The covariance that ``source`` means."""
    with full_precision(moments.mean.device):
        matrix = covariance(moments, center="sequence" if source == "pooled" else None)
    return Matrix(matrix, moments.mean.shape[0], moments.num_tokens, moments.num_nonfinite)
