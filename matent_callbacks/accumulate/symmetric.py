"""Symmetric matrices in packed form: d(d + 1)/2 numbers instead of d^2.

With h = ceil(d / 2), a symmetric ``(d, d)`` matrix is the block matrix ``[[A, B], [B.T, C]]``, where A is ``(h, h)``.
Its packed form is ``(h, d + 1)``::

    column 0         the diagonal of C
    columns 1 to h   on and below the diagonal the lower triangle of A, above it the strict upper triangle of C
    the others       B

For an odd d, C has one row and column less than A; the places without a number are 0.

The blocks are read and written as slices. An index of the triangle (``torch.tril_indices``) would itself take four
times the memory that packing saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A and C are computed in strips of so many rows, or of a quarter of all rows if that is more: narrower strips would
# leave out more of the half that is not needed, but small products are slow.
_STRIP = 128


def add_second_moment(packed: Tensor, z: Tensor) -> None:
    """Add ``z.T @ z`` of ``(N, d)`` to a packed ``(ceil(d / 2), d + 1)`` in place.

    Products are added where they belong, so what it allocates is small: one square of a strip at a time. A wide ``z``
    takes 9/16 of the operations of the whole product.
    """
    half, d = packed.shape[0], z.shape[1]
    rest = d - half
    left, right = z[:, :half], z[:, half:]
    square = packed[:, 1 : half + 1]
    packed[:, half + 1 :].addmm_(left.T, right)
    strip = max(_STRIP, -(-half // 4))
    for start in range(0, half, strip):
        rows = slice(start, start + strip)
        own = left[:, rows]
        square[rows, :start].addmm_(own.T, left[:, :start])
        square[rows, rows] += (own.T @ own).tril_()
        own = right[:, rows]
        if not own.shape[1]:
            continue
        end = start + own.shape[1]
        square[start:end, end:rest].addmm_(own.T, right[:, end:])
        product = own.T @ own
        packed[start:end, 0] += product.diagonal()
        square[start:end, start:end] += product.triu_(1)


def lower_triangle(packed: Tensor) -> Tensor:
    """``(d, d)`` with the numbers of a packed matrix on and below its diagonal, and arbitrary ones above.

    Symmetric solvers read no more than that. The result is laid out column by column, as LAPACK wants it.
    """
    half, d = packed.shape[0], packed.shape[1] - 1
    upper = packed.new_empty(d, d)
    _copy_diagonal_blocks(packed, upper[:half, :half], upper[half:, half:])
    upper[:half, half:] = packed[:, half + 1 :]
    return upper.T


def blocks(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C of a packed matrix ``[[A, B], [B.T, C]]``; B is a view. For products: they take half of the memory."""
    half, d = packed.shape[0], packed.shape[1] - 1
    first, last = packed.new_empty(half, half), packed.new_empty(d - half, d - half)
    _copy_diagonal_blocks(packed, first, last)
    return symmetric(first.T), packed[:, half + 1 :], symmetric(last.T)


def _copy_diagonal_blocks(packed: Tensor, first: Tensor, last: Tensor) -> None:
    """Copy A and C, which are right on and above the diagonal then."""
    half, rest = len(first), len(last)
    square = packed[:, 1 : half + 1]
    for start in range(0, half, _STRIP):
        rows = slice(start, min(start + _STRIP, half))
        first[:, rows] = _transposed(square[rows])
    last[:] = square[:rest, :rest]
    last.diagonal().copy_(packed[:rest, 0])


def diagonal(packed: Tensor) -> Tensor:
    """``(d,)``: the diagonal of a packed matrix."""
    half, d = packed.shape[0], packed.shape[1] - 1
    return torch.cat([packed[:, 1 : half + 1].diagonal(), packed[: d - half, 0]])


def symmetric(lower: Tensor) -> Tensor:
    """Return the symmetric matrix with the lower triangle of ``lower``, whose upper triangle is overwritten."""
    columns = lower.T  # that of `lower_triangle` is laid out column by column
    for start in range(0, len(lower), _STRIP):
        own = slice(start, start + _STRIP)
        columns[own, :start] = _transposed(columns[:start, own])
        square = columns[own, own].triu()
        columns[own, own] = square + square.triu(1).T
    return columns


def _transposed(matrix: Tensor) -> Tensor:
    """A transposed copy. Between contiguous tensors copying is several times as fast as into or from a slice."""
    return torch.empty_like(matrix.T, memory_format=torch.contiguous_format).copy_(matrix.contiguous().T)
