"""What a layer accumulates during one reading."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.moments import token_moments
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    sequence_mean,
)
from matent_callbacks.accumulate.symmetric import PackedMoments, lower_triangle, packed_second_moment, unpack_symmetric
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import Tokens, check_hidden_states, prepare_tokens


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

    moments: PackedMoments
    gram: Tensor | None = None
    """``(N, N)``, of fewer tokens than features; there are no moments but the counts then."""
    gram_features: int = 0

    @property
    def num_features(self) -> int:
        """Number of features d, 0 where no token was seen."""
        return self.gram_features or self.moments.num_features

    @property
    def size(self) -> int:
        """Rows of :meth:`lower`."""
        return self.num_features if self.gram is None else self.gram.shape[0]

    def lower(self) -> Tensor:
        """``(k, k)``, right on and below the diagonal, and for the one who asks to overwrite."""
        if self.gram is not None:
            return self.gram
        matrix, mean = lower_triangle(self.moments.scatter), self.moments.mean
        if self.moments.about_origin:
            return matrix
        # A large mean, added in float32, would wipe out the small eigenvalues. MPS has no float64.
        if mean.device.type != "mps":
            matrix, mean = matrix.double(), mean.double()
        return matrix.addr_(mean, mean * self.moments.num_tokens)

    def full(self) -> Tensor:
        """``(k, k)`` of tokens that were centred, both triangles."""
        return unpack_symmetric(self.moments.scatter) if self.gram is None else self.gram

    def to_cpu(self) -> Matrix:
        """All of it in the host's memory."""
        gram = None if self.gram is None else self.gram.cpu()
        return Matrix(self.moments.to(torch.device("cpu")), gram, self.gram_features)


class PooledTokens:
    """All tokens of one source: themselves while they are fewer than d, their moments from then on.

    Either way no more than d^2 numbers are kept. The Gram matrix of N tokens costs N^2 d to make and N^3 to decompose
    where the covariance costs N d^2 and d^3.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        zero = torch.zeros((), dtype=torch.int64, device=device)
        nothing = torch.zeros(0, 1, dtype=dtype, device=device)
        self._moments = PackedMoments(zero, zero, nothing[:, 0], nothing, about_origin=source == "pooled")
        self._kept: list[Tokens] = []
        self._num_kept = 0
        self._device = device

    def add(self, tokens: Tokens) -> None:
        """Add a batch, in full precision; an error leaves what was there."""
        width = tokens.values.shape[-1]
        if self._num_features not in (0, width):
            raise ValueError(f"it had {self._num_features} features before and has {width} now.")
        # By shape: how many of them count is known on the device only.
        slots = tokens.valid.numel()
        if self._moments.num_features == 0 and self._num_kept + slots <= width:
            self._kept.append(tokens)
            self._num_kept += slots
            return
        self._merge_kept()
        self._moments = self._moments.merged(self._moments_of(tokens))

    def add_moments(self, moments: PackedMoments) -> None:
        """Add what :meth:`moments` of another gave."""
        self._merge_kept()
        self._moments = self._moments.merged(moments)

    def moments(self) -> PackedMoments:
        """Of all tokens; with d = 0 while none was seen."""
        self._merge_kept()
        return self._moments

    def matrix(self) -> Matrix:
        """The smaller of Gram matrix and covariance."""
        if not self._kept:
            return Matrix(self._moments)
        z = torch.cat([tokens.values.flatten(0, 1).to(self._device) for tokens in self._kept])
        # As in `lower`: the mean of tokens that were not centred would wipe out the small eigenvalues.
        z = z.double() if self._source == "raw" and z.device.type != "mps" else z
        counts = [torch.stack([t.valid.sum(), t.nonfinite]).to(self._device) for t in self._kept]
        num_tokens, num_nonfinite = torch.stack(counts).sum(0)
        with full_precision(z.device):
            gram = z @ z.T
        return Matrix(self._moments._replace(num_tokens=num_tokens, num_nonfinite=num_nonfinite), gram, z.shape[1])

    @property
    def _num_features(self) -> int:
        return self._kept[0].values.shape[-1] if self._kept else self._moments.num_features

    def _merge_kept(self) -> None:
        kept, self._kept, self._num_kept = self._kept, [], 0
        for tokens in kept:
            with full_precision(tokens.values.device):
                self._moments = self._moments.merged(self._moments_of(tokens))

    def _moments_of(self, tokens: Tokens) -> PackedMoments:
        if self._source == "raw":
            return PackedMoments.of(token_moments(tokens)).to(self._device)
        # Centred by sequence: its covariance is the one about the origin.
        z = tokens.values.flatten(0, 1)
        scatter, no_mean = packed_second_moment(z), z.new_zeros(0)
        return PackedMoments(tokens.valid.sum(), tokens.nonfinite, no_mean, scatter, about_origin=True).to(self._device)
