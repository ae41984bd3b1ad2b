"""Reads hidden states a piece at a time, in a fixed amount of memory.

Statistics are computed in float32 or float64, whatever the dtype of the hidden states, and on copies, since the model
goes on with the originals. Copies of a whole batch would take several times its memory, in the middle of the forward
pass, when a GPU is fullest. So short sequences are prepared a few at a time, and one that is too long for that part by
part: first the mean of its tokens, then the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Moments, empty_moments, with_scatter
from matent_callbacks.accumulate.symmetric import add_second_moment
from matent_callbacks.functional._tokens import (
    Tokens,
    directions_from,
    into_range,
    largest_of_rows,
    scaled_to_unit_length_,
    squares_are_lost,
)

WORK_SPACE = 64 * 2**20
"""Bytes that a reading takes beyond its state, however many and however long the sequences are.
One sequence's matrix of min(T, d)^2 numbers may be larger: it is needed twice for its eigenvalues."""

# Preparing tokens takes two copies of them for a moment. Half of the work space is left for matrices.
_PIECE = WORK_SPACE // 4


def rows_of_a_piece(num_features: int, dtype: torch.dtype) -> int:
    """How many rows of ``num_features`` numbers are worked on at a time."""
    return max(1, _PIECE // (num_features * dtype.itemsize))


def slices(total: int, most: int) -> Iterator[slice]:
    """Split ``total`` into at least one slice, none longer than ``most``, all about equally long."""
    count = max(1, -(-total // most))
    for number in range(count):
        yield slice(total * number // count, total * (number + 1) // count)


class Piece(NamedTuple):
    """Centred and normalised tokens of some sequences, or of a part of one sequence."""

    tokens: Tokens
    num_sequences: Tensor
    """``()`` int64: sequences with a valid token. A sequence that comes in parts is counted with its first part."""


class LongSequence:
    """One sequence that does not fit into the work space, and is centred and normalised part by part.

    Args:
        states: ``(T, d)``.
        mask: ``(T,)`` bool.
        center: Subtract the mean token.
        normalize: Scale each token to unit length.
        dtype: Of the statistics.
        alone: Whether it has a spectrum of its own, so that its scale does not matter.
        largest: ``(T,)``, the largest magnitude of each token, if it is known.
    """

    def __init__(
        self,
        states: Tensor,
        mask: Tensor,
        *,
        center: bool,
        normalize: bool,
        dtype: torch.dtype,
        alone: bool = False,
        largest: Tensor | None = None,
    ) -> None:
        self._states = states
        self._center = center
        self._normalize = normalize
        self._dtype = dtype
        self._parts = list(slices(states.shape[0], rows_of_a_piece(states.shape[1], dtype)))
        wide = states.dtype if states.dtype == torch.float64 else dtype
        if largest is None:
            largest = torch.cat([largest_of_rows(states[part].to(wide)) for part in self._parts])
        self.largest = largest
        finite = torch.isfinite(largest)
        self.valid = mask & finite
        """``(T,)`` bool: the tokens that count."""
        self.nonfinite = (mask & ~finite).sum()
        """``()`` int64: tokens left out because of NaN or Inf."""
        self._weight = self.valid.unsqueeze(-1).to(dtype)
        self._factor: Tensor | None = None
        largest = torch.where(self.valid, largest, 0.0)
        if normalize or alone:
            factor = into_range(largest.amax(0, keepdim=True) if center or not normalize else largest, dtype)
            if states.device.type != "cpu" or bool((factor != 1).any()):
                self._factor = factor
        total = torch.zeros(states.shape[1], dtype=dtype, device=states.device)
        for part in self._parts if center else ():
            total += self._where(self.valid[part], self._scaled(part)).sum(0)
        self._mean = total / self._count
        if not (normalize or alone):
            self._mean.masked_fill_(squares_are_lost(largest.amax(), dtype), torch.nan)

    def pieces(self) -> Iterator[Piece]:
        """The tokens, centred and normalised, as pieces ``(1, part of T, d)``."""
        for part in self._parts:
            # Counts of the whole sequence go with its first part.
            first = int(part.start == 0)
            tokens = Tokens(self._prepared(part).unsqueeze(0), self.valid[part].unsqueeze(0), self.nonfinite * first)
            yield Piece(tokens, self.valid.any().to(torch.int64) * first)
            del tokens

    def moments(self) -> Moments:
        """Moments of the centred and normalised tokens, with their scatter about the origin."""
        num_features = self._states.shape[1]
        moments = empty_moments(num_features, dtype=self._dtype, device=self._states.device)
        moments = with_scatter(moments, num_features, about_origin=True)
        for part in self._parts:
            add_second_moment(moments.scatter, self._prepared(part))
        return moments._replace(
            num_tokens=self.valid.sum(),
            num_sequences=self.valid.any().to(torch.int64),
            num_nonfinite=self.nonfinite,
        )

    def gram(self) -> Tensor:
        """Gram matrix ``(T, T)`` of the centred and normalised tokens, summed over a few features at a time.

        No token is complete before the end, so tokens are normalised then: their lengths are the square roots of the
        diagonal.
        """
        length, num_features = self._states.shape
        gram = torch.zeros(length, length, dtype=self._dtype, device=self._states.device)
        for columns in slices(num_features, rows_of_a_piece(length, self._dtype)):
            x = self._where(self.valid, self._scaled(slice(None), columns))
            if self._center:
                x = torch.addcmul(x, self._weight, self._mean[columns], value=-1)
                x.addcmul_(self._weight, x.sum(0) / self._count, value=-1)
            gram.addmm_(x, x.T)
            del x
        if self._normalize:
            scale = gram.diagonal().rsqrt()
            scale = torch.where(torch.isfinite(scale), scale, 0.0)
            gram.mul_(scale).mul_(scale.unsqueeze(-1))
        return gram

    @property
    def has_fewer_tokens_than_features(self) -> bool:
        """Whether the Gram matrix is smaller than the covariance."""
        return self._states.shape[0] < self._states.shape[1]

    @cached_property
    def _count(self) -> Tensor:
        return self.valid.sum().clamp(min=1)

    @cached_property
    def _residual(self) -> Tensor:
        """Mean of the tokens after the mean was subtracted: what is left of it because of rounding."""
        total = torch.zeros_like(self._mean)
        for part in self._parts:
            total += self._without_mean(part).sum(0)
        return total / self._count

    def _prepared(self, part: slice) -> Tensor:
        if not self._center:
            # This copies in any case. A view would change when the model writes into its hidden states.
            x = torch.where(self.valid[part].unsqueeze(-1), self._scaled(part), 0.0)
            return scaled_to_unit_length_(x) if self._normalize else x
        if self._normalize and self._states.device.type == "cpu":
            valid = self.valid[part]
            directions = directions_from(self._mean, self._scaled(part), None if bool(valid.all()) else valid)
            if directions is not None:
                return directions
        residual = self._residual
        x = self._without_mean(part).addcmul_(self._weight[part], residual, value=-1)
        return scaled_to_unit_length_(x) if self._normalize else x

    def _without_mean(self, part: slice) -> Tensor:
        x = torch.addcmul(self._scaled(part), self._weight[part], self._mean, value=-1)
        return x.masked_fill_(~self.valid[part].unsqueeze(-1), 0.0)

    def _scaled(self, part: slice, columns: slice = slice(None)) -> Tensor:
        """Tokens whose squares are within the range of the dtype, if their scale does not matter."""
        x = self._states[part, columns]
        if self._factor is None:
            return x.to(self._dtype)
        factor = self._factor if len(self._factor) == 1 else self._factor[part]
        return (x.to(torch.promote_types(x.dtype, self._dtype)) * factor.unsqueeze(-1)).to(self._dtype)

    @staticmethod
    def _where(valid: Tensor, x: Tensor) -> Tensor:
        """``x`` with zeros in the rows that are not valid; on the CPU ``x`` itself if all rows are."""
        if x.device.type == "cpu" and bool(valid.all()):
            return x
        return torch.where(valid.unsqueeze(-1), x, 0.0)
