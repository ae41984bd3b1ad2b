"""Symmetric matrices as one half of their numbers, and moments that are kept so."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.functional.moments import Moments, ratio

# By slices: an index of the upper triangle would take four times what packing saves. With d = 2 h, the two triangles on
# the diagonal fit into each other, h x (h + 1), beside the h x h block that is off it. An odd d leaves gaps.


def pack_symmetric(matrix: Tensor) -> Tensor:
    """``(d, d)`` to ``(ceil(d / 2), d + 1)``."""
    half = (matrix.shape[0] + 1) // 2
    return _packed(matrix[:half, :half], matrix[half:, half:], matrix[:half, half:])


def packed_second_moment(z: Tensor) -> Tensor:
    """``z.T @ z`` of ``(N, d)``, packed; at three quarters of the cost of the whole."""
    half = (z.shape[1] + 1) // 2
    left, right = z[:, :half], z[:, half:]
    return _packed(left.T @ left, right.T @ right, left.T @ right)


def unpack_symmetric(packed: Tensor) -> Tensor:
    """``(ceil(d / 2), d + 1)`` to ``(d, d)``."""
    half, d = packed.shape[0], packed.shape[1] - 1
    matrix = packed.new_empty(d, d)
    lower, upper = packed[:, :half].tril(), packed[: d - half, 1 : d - half + 1].triu()
    matrix[:half, :half] = lower + lower.tril(-1).T
    matrix[half:, half:] = upper + upper.triu(1).T
    matrix[:half, half:] = packed[:, half + 1 :]
    matrix[half:, :half] = packed[:, half + 1 :].T
    return matrix


def lower_triangle(packed: Tensor) -> Tensor:
    """``(d, d)`` that holds below and on its diagonal what was packed: all that a symmetric solver reads."""
    half, d = packed.shape[0], packed.shape[1] - 1
    matrix = packed.new_zeros(d, d)
    matrix[:half, :half] = packed[:, :half]
    matrix[half:, half:] = packed[: d - half, 1 : d - half + 1].T
    matrix[half:, :half] = packed[:, half + 1 :].T
    return matrix


def _packed(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
    half, rest = between.shape
    packed = between.new_zeros(half, half + rest + 1)
    packed[:, :half] = first.tril()
    packed[:rest, 1 : rest + 1] += second.triu()
    packed[:, half + 1 :] = between
    return packed


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
