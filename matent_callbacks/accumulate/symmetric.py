"""Symmetric matrices as one half of their numbers, and moments that are kept so."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Moments, ratio

# By slices: an index of the upper triangle would take four times what packing saves. With d = 2 h there are, in this
# order, the diagonal of the lower right block; the upper left block up to its diagonal and, above that, the lower right
# one, transposed; the upper right block: h x (1 + h + h). An odd d leaves gaps.

# Below, a product is made faster whole than in parts.
_WORTH_HALVING = 256


def pack_symmetric(matrix: Tensor) -> Tensor:
    """``(d, d)`` to ``(ceil(d / 2), d + 1)``."""
    d = matrix.shape[0]
    half = (d + 1) // 2
    packed = matrix.new_empty(half, d + 1)
    packed[:, 1:] = matrix[:half]
    return _folded(packed, matrix[half:, half:])


def packed_second_moment(z: Tensor) -> Tensor:
    """``z.T @ z`` of ``(N, d)``, packed, without a graph; a wide one at five eighths of the cost of the whole."""
    d = z.shape[1]
    half = (d + 1) // 2
    left, right = z[:, :half], z[:, half:]
    packed = z.new_empty(half, d + 1)
    if half < _WORTH_HALVING:
        torch.mm(left.T, z, out=packed[:, 1:])
    else:
        packed[:, 1 : half + 1] = _second_moment(left)
        torch.mm(left.T, right, out=packed[:, half + 1 :])
    return _folded(packed, _second_moment(right))


def _second_moment(z: Tensor) -> Tensor:
    """``z.T @ z``, of a wide ``z`` without the quarter above the diagonal."""
    if z.shape[1] < _WORTH_HALVING:
        return z.T @ z
    half = z.shape[1] // 2
    product = z.new_empty(z.shape[1], z.shape[1])
    torch.mm(z[:, :half].T, z[:, :half], out=product[:half, :half])
    torch.mm(z[:, half:].T, z, out=product[half:])
    return product


def _folded(packed: Tensor, lower_right: Tensor) -> Tensor:
    """With that block in the place of what the upper left one has above its diagonal."""
    half, rest = packed.shape[0], lower_right.shape[0]
    square = packed[:, 1 : half + 1].tril_()
    square[:rest, :rest] += lower_right.T.triu(1)
    if rest < half:
        packed[rest:, 0] = 0
    packed[:rest, 0] = lower_right.diagonal()
    return packed


def unpack_symmetric(packed: Tensor) -> Tensor:
    """``(ceil(d / 2), d + 1)`` to ``(d, d)``."""
    lower = lower_triangle(packed).tril_()
    return lower + lower.tril(-1).T


def lower_triangle(packed: Tensor) -> Tensor:
    """``(d, d)`` with what was packed on and below its diagonal, all that a symmetric solver reads; above, anything."""
    half, d = packed.shape[0], packed.shape[1] - 1
    rest = d - half
    square = packed[:, 1 : half + 1]
    # Column by column in memory, as LAPACK has it.
    upper = packed.new_empty(d, d)
    upper[:half, :half] = square.T
    upper[:half, half:] = packed[:, half + 1 :]
    upper[half:, half:] = square[:rest, :rest]
    upper[half:, half:].diagonal().copy_(packed[:rest, 0])
    return upper.T


class PackedMoments(NamedTuple):
    """Moments with half of the scatter: what a monitor keeps of a layer, and what travels between ranks."""

    num_tokens: Tensor
    """``()`` int64."""
    num_nonfinite: Tensor
    """``()`` int64."""
    mean: Tensor
    """``(d,)``; ``(0,)`` where the scatter is about the origin."""
    scatter: Tensor
    """``(ceil(d / 2), d + 1)``."""
    about_origin: bool

    @classmethod
    def of(cls, moments: Moments) -> PackedMoments:
        """Moments about the mean."""
        scatter = pack_symmetric(moments.scatter)
        return cls(moments.num_tokens, moments.num_nonfinite, moments.mean, scatter, about_origin=False)

    @property
    def num_features(self) -> int:
        """Number of features d, 0 where no token was seen."""
        return self.scatter.shape[1] - 1

    def to(self, device: torch.device) -> PackedMoments:
        """The same on a device."""
        if self.scatter.device == device:
            return self
        counts = self.num_tokens.to(device), self.num_nonfinite.to(device)
        return PackedMoments(*counts, self.mean.to(device), self.scatter.to(device), about_origin=self.about_origin)

    def scatter_about(self, mean: Tensor) -> Tensor:
        """The scatter about another mean (Chan, Golub & LeVeque 1979)."""
        if self.about_origin:
            return self.scatter
        offset = self.mean - mean
        return self.scatter + pack_symmetric(torch.outer(offset, offset * self.num_tokens))

    def merged(self, other: PackedMoments) -> PackedMoments:
        """Moments of the union of two sets of tokens."""
        if not self.num_features:
            return other
        count = self.num_tokens + other.num_tokens
        mean = self.mean + (other.mean - self.mean) * ratio(other.num_tokens, count, self.mean.dtype)
        scatter = self.scatter_about(mean) + other.scatter_about(mean)
        return PackedMoments(
            count, self.num_nonfinite + other.num_nonfinite, mean, scatter, about_origin=self.about_origin
        )
