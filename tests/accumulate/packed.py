"""Packs a symmetric matrix, block by block, as the layout is described."""

from __future__ import annotations

from torch import Tensor


def pack(matrix: Tensor) -> Tensor:
    """``(d, d)`` to ``(ceil(d / 2), d + 1)``."""
    d = len(matrix)
    half = (d + 1) // 2
    rest = d - half
    a, b, c = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    packed = matrix.new_zeros(half, d + 1)
    packed[:rest, 0] = c.diagonal()
    packed[:, 1 : half + 1] = a.tril()
    packed[:rest, 1 : rest + 1] += c.triu(1)
    packed[:, half + 1 :] = b
    return packed
