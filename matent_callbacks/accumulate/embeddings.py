"""Computes one vector per sequence: the mean, the last or the first of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Embedding
from matent_callbacks.accumulate.pieces import rows_of_a_piece, sequences_at_a_time, slices
from matent_callbacks.functional._tokens import largest_of_rows

_SHRUNK = 2.0**-30


class Embeddings(NamedTuple):
    """The vectors of some sequences."""

    values: Tensor
    """``(B, d)``; they may hold NaN or Inf, and are arbitrary where they do not count."""
    valid: Tensor
    """``(B,)`` bool: sequences of at least one token that counts."""
    nonfinite: Tensor
    """``()`` int64: tokens left out of the vectors because of NaN or Inf."""


def embeddings_at_a_time(
    states: Tensor, mask: Tensor, embedding: Embedding, *, dtype: torch.dtype
) -> Iterator[Embeddings]:
    """Yield the vectors of ``(B, T, d)``, in ``dtype`` or float64 if states are, for a few sequences at a time."""
    if embedding == "mean":
        # float64 may be out of the range of float32.
        wide = torch.promote_types(states.dtype, dtype)
        for some, valid in sequences_at_a_time(states, mask, wide):
            yield _means(some, valid, wide)
        return
    place = torch.arange(mask.shape[1], device=mask.device)
    if embedding == "last":
        chosen = torch.where(mask, place, 0).amax(1)
    else:
        chosen = torch.where(mask, place, mask.shape[1] - 1).amin(1)
    counts = mask.any(1)
    for rows in slices(len(states), rows_of_a_piece(states.shape[-1], dtype)):
        of_each = torch.arange(rows.start, rows.stop, device=states.device)
        # A token that stands for its sequence has no substitute: with NaN or Inf the sequence is left out.
        vectors = states[of_each, chosen[rows]]
        yield Embeddings(
            vectors.to(torch.promote_types(vectors.dtype, dtype)), counts[rows], mask.new_zeros((), dtype=torch.int64)
        )


def rows_at_a_time(rows: Tensor, mask: Tensor, *, dtype: torch.dtype) -> Iterator[Embeddings]:
    """Yield vectors ``(N, d)``, which are one per sequence already, as :func:`embeddings_at_a_time` does."""
    for some in slices(len(rows), rows_of_a_piece(rows.shape[-1], dtype)):
        yield Embeddings(
            rows[some].to(torch.promote_types(rows.dtype, dtype)), mask[some], mask.new_zeros((), dtype=torch.int64)
        )


def _means(states: Tensor, mask: Tensor, dtype: torch.dtype) -> Embeddings:
    """Compute the means of sequences that fit into the work space, or of one that does not, part by part."""
    batch, length, num_features = states.shape
    total = torch.zeros(batch, num_features, dtype=dtype, device=states.device)
    count = torch.zeros(batch, dtype=torch.int64, device=states.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=states.device)
    scale = torch.ones_like(total[:, :1])
    for part in slices(length, max(1, rows_of_a_piece(num_features, dtype) // max(1, batch))):
        x = states[:, part].to(dtype)
        largest = largest_of_rows(x)
        finite = torch.isfinite(largest)
        valid = mask[:, part] & finite
        x = torch.where(valid.unsqueeze(-1), x, 0.0)
        # So that a sum cannot overflow where the mean does not.
        huge = (torch.where(valid, largest, 0.0) > torch.finfo(dtype).max * _SHRUNK).any(1, keepdim=True)
        before, scale = scale, torch.where(huge, _SHRUNK, scale)
        total = total * (scale / before) + x.mul_(scale.unsqueeze(1)).sum(1)
        count += valid.sum(1)
        nonfinite += (mask[:, part] & ~finite).sum()
        del x
    mean = total / count.clamp(min=1).unsqueeze(-1).to(dtype)
    return Embeddings(mean / scale, count > 0, nonfinite)
