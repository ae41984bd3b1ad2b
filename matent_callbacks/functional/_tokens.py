"""Checks hidden states and masks, and turns them into centred, normalised tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# If the mean of a sequence is this many times as long as the centred tokens, the rounding of the mean shows.
_DWARFS = 8.0

# Numbers whose largest magnitude is from 2^-safe to 2^safe have squares, and sums of these, within the range of a
# dtype, and so do those that are smaller by as much as rounding errors are.
_SAFE = {torch.float32: 40, torch.float64: 400}
# Powers of two that are normal numbers in a dtype, either way.
_MOST = {torch.float32: 120, torch.float64: 1000}


class Tokens(NamedTuple):
    """Centred and normalised tokens, ``(B, T, d)``; rows that do not count are zero."""

    values: Tensor
    valid: Tensor
    """``(B, T)`` bool: the tokens that count."""
    nonfinite: Tensor
    """``()`` int64: tokens that the mask has in, but that are left out because of NaN or Inf."""


def check_hidden_states(hidden_states: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden states as ``(B, T, d)`` and the mask as bool ``(B, T)``, or raise naming the argument."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"`hidden_states` must be a torch.Tensor, got {type(hidden_states).__name__}.")
    if not hidden_states.is_floating_point():
        raise TypeError(f"`hidden_states` must be a floating point tensor, got {hidden_states.dtype}.")
    if hidden_states.ndim not in (2, 3):
        raise ValueError(
            f"`hidden_states` must have shape (tokens, features) or (batch, tokens, features), "
            f"got {tuple(hidden_states.shape)}."
        )
    if hidden_states.shape[-1] == 0:
        raise ValueError(f"`hidden_states` must have at least one feature, got {tuple(hidden_states.shape)}.")
    expected = hidden_states.shape[:-1]
    if attention_mask is None:
        attention_mask = torch.ones(expected, dtype=torch.bool, device=hidden_states.device)
    elif not isinstance(attention_mask, Tensor):
        raise TypeError(f"`attention_mask` must be a torch.Tensor or None, got {type(attention_mask).__name__}.")
    elif attention_mask.shape != expected:
        raise ValueError(
            f"`attention_mask` must have the shape of `hidden_states` without its features, {tuple(expected)}, "
            f"got {tuple(attention_mask.shape)}."
        )
    elif attention_mask.is_complex():
        raise TypeError(f"`attention_mask` must be bool, integer or real, got {attention_mask.dtype}.")
    mask = attention_mask.to(hidden_states.device)
    mask = mask if mask.dtype == torch.bool else mask > 0
    if hidden_states.ndim == 2:
        return hidden_states.unsqueeze(0), mask.unsqueeze(0)
    return hidden_states, mask


def check_stage(name: str, hidden_states: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`check_hidden_states` for one of several stages, whose name is put into the error."""
    try:
        return check_hidden_states(hidden_states, attention_mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from error


def largest_of_rows(x: Tensor) -> Tensor:
    """The largest magnitude ``(...)`` in each row of ``(..., d)``, NaN or Inf if the row holds any, in one pass or two.

    Unlike a sum, it cannot overflow.
    """
    if x.device.type == "cpu":  # whose norm of that order is not vectorised
        return torch.maximum(x.amax(-1), -x.amin(-1))
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=-1)
    return largest


def finite_rows(x: Tensor) -> Tensor:
    """Which rows of ``(..., d)`` hold neither NaN nor Inf, without a bool tensor as large as ``x``."""
    return torch.isfinite(largest_of_rows(x))


def into_range(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two that bring numbers as large as ``largest`` to where their squares neither under- nor overflow.

    They are 1 where nothing has to be done. Multiplying by them is exact.
    """
    exponent = largest.log2().floor()
    odd = torch.isfinite(exponent) & (exponent.abs() > _SAFE[dtype])
    most = _MOST[largest.dtype if largest.dtype == torch.float64 else torch.float32]
    return torch.where(odd, exponent.clamp(-most, most).neg().exp2(), 1.0)


def squares_are_lost(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether numbers of which none is larger than ``largest`` have squares that ``dtype`` cannot hold in full."""
    info = torch.finfo(dtype)
    lost: Tensor = (largest > 0) & (largest < (info.tiny / info.eps) ** 0.5)
    return lost


def prepare_tokens(
    hidden_states: Tensor, mask: Tensor, *, center: bool, normalize: bool, dtype: torch.dtype, alone: bool = False
) -> Tokens:
    """Zero the rows that are masked or not finite, centre each sequence, scale rows to unit length.

    ``alone``: each sequence has a spectrum of its own, so that rows without unit length may have any common scale.
    Otherwise centred rows without unit length are NaN if their squares would be lost.
    """
    if center and normalize and hidden_states.device.type == "cpu" and mask.numel() > 0 and bool(mask.all()):
        x = hidden_states.to(dtype)
        values = directions_from(x.mean(1, keepdim=True), x, None)
        if values is not None:
            return Tokens(values, mask, torch.zeros((), dtype=torch.int64))
    # float64 may be out of the range of float32.
    x = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.to(dtype)
    largest = largest_of_rows(x)
    finite = torch.isfinite(largest)
    valid = mask & finite
    x = torch.where(valid.unsqueeze(-1), x, 0.0)
    largest = torch.where(valid, largest, 0.0)
    if center and not (normalize or alone) and mask.numel() > 0:
        x.masked_fill_(valid.unsqueeze(-1) & squares_are_lost(largest.amax(), dtype), torch.nan)
    if (normalize or alone) and mask.numel() > 0:
        factor = into_range(largest.amax(1, keepdim=True) if center or not normalize else largest, dtype)
        # A look at a value spares a pass over memory on the CPU, where it costs nothing.
        if not center or x.device.type != "cpu" or bool((factor != 1).any()):
            x.mul_(factor.unsqueeze(-1))
    x = x.to(dtype)
    if center:
        weight = valid.unsqueeze(-1).to(dtype)
        count = weight.sum(1, keepdim=True).clamp(min=1)
        # Twice: the second time removes the rounding of a mean that dwarfs the spread.
        for _ in range(2):
            x.addcmul_(weight, x.sum(1, keepdim=True) / count, value=-1)
    return Tokens(scaled_to_unit_length_(x) if normalize else x, valid, (mask & ~finite).sum())


def scaled_to_unit_length_(x: Tensor) -> Tensor:
    """Divide each row ``(..., d)`` by its length, in place; a zero row stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div_(torch.where(norm > 0, norm, 1.0))


def directions_from(mean: Tensor, x: Tensor, valid: Tensor | None) -> Tensor | None:
    """Centre rows ``(..., d)`` by ``mean`` and normalise them, in half as many passes over memory as usual.

    For the CPU, where reading a value costs nothing. ``valid`` ``(...)`` says which rows count, ``None``: all do. The
    result is ``None`` if a row that counts is not finite, or the mean is so long that its rounding would show, or
    squares might under- or overflow.
    """
    x = x - mean
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    largest = norm.amax() if valid is None else torch.where(valid.unsqueeze(-1), norm, 0.0).amax()
    if valid is not None:
        norm.masked_fill_(~valid.unsqueeze(-1), torch.inf)
    smallest, safe = norm.amin(), 2.0 ** _SAFE[x.dtype]
    # False if either is NaN, as it is if some row holds NaN or Inf.
    near = torch.linalg.vector_norm(mean, dim=-1).amax() <= _DWARFS * smallest
    if bool(near & (largest <= safe) & (smallest >= 1 / safe)):
        x.div_(norm.clamp_(min=torch.finfo(x.dtype).tiny))
        return x if valid is None else x.masked_fill_(~valid.unsqueeze(-1), 0.0)
    return None
