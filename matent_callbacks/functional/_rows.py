"""Checks paired rows, and centres them, for the measures of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import finite_rows, prepare_tokens


def paired_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs that are finite on both sides, in the dtype to compute in, or raise naming the argument."""
    for name, rows in (("x", x), ("y", y)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(rows).__name__}.")
        if not rows.is_floating_point():
            raise TypeError(f"`{name}` must be a floating point tensor, got {rows.dtype}.")
        if rows.ndim != 2:
            raise ValueError(f"`{name}` must have shape (pairs, features), got {tuple(rows.shape)}.")
        if rows.shape[1] == 0:
            raise ValueError(f"`{name}` must have at least one feature, got {tuple(rows.shape)}.")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"`y` must have as many rows as `x`, {x.shape[0]}, got {y.shape[0]}.")
    if x.shape[0] < 2:
        raise ValueError(f"`x` must have at least 2 rows, got {x.shape[0]}.")
    if x.device != y.device:
        raise ValueError(f"`y` must be on the device of `x`, {x.device}, got {y.device}.")
    dtype = common_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    finite = finite_rows(x) & finite_rows(y)
    return x[finite], y[finite]


def common_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in map(statistics_dtype, tensors) else torch.float32


def prepared(rows: Tensor, *, center: bool, normalize: bool, counts: Tensor | None = None) -> Tensor:
    """Centre rows, or scale them to unit length; those that do not count are zero."""
    mask = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if counts is None else counts
    tokens = prepare_tokens(
        rows.unsqueeze(0), mask.unsqueeze(0), center=center, normalize=normalize, dtype=rows.dtype, alone=True
    )
    return tokens.values[0]


def centred_features(rows: Tensor, counts: Tensor | None = None) -> Tensor:
    """Centre rows, and scale them all by one factor."""
    centred = prepared(rows, center=True, normalize=False, counts=counts)
    # So that the fourth powers that follow stay within the range of float32.
    largest = centred.abs().amax()
    return centred / torch.where(largest > 0, largest, 1.0)
