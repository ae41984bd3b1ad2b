"""Computes one vector per sequence: the mean, the last or the first of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Embedding
from matent_callbacks.accumulate.pieces import rows_of_a_piece, sequences_at_a_time, slices
from matent_callbacks.functional._tokens import finite_rows


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
    """Yield the vectors of ``(B, T, d)`` in ``dtype``, for a few sequences at a time."""
    if embedding == "mean":
        for some, valid in sequences_at_a_time(states, mask, dtype):
            yield _means(some, valid, dtype)
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
        yield Embeddings(states[of_each, chosen[rows]].to(dtype), counts[rows], mask.new_zeros((), dtype=torch.int64))


def rows_at_a_time(rows: Tensor, mask: Tensor, *, dtype: torch.dtype) -> Iterator[Embeddings]:
    """Yield vectors ``(N, d)``, which are one per sequence already, in ``dtype``, a few at a time."""
    for some in slices(len(rows), rows_of_a_piece(rows.shape[-1], dtype)):
        yield Embeddings(rows[some].to(dtype), mask[some], mask.new_zeros((), dtype=torch.int64))


def _means(states: Tensor, mask: Tensor, dtype: torch.dtype) -> Embeddings:
    """Compute the means of sequences that fit into the work space, or of one that does not, part by part."""
    batch, length, num_features = states.shape
    total = torch.zeros(batch, num_features, dtype=dtype, device=states.device)
    count = torch.zeros(batch, dtype=torch.int64, device=states.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=states.device)
    for part in slices(length, max(1, rows_of_a_piece(num_features, dtype) // max(1, batch))):
        x = states[:, part].to(dtype)
        finite = finite_rows(x)
        valid = mask[:, part] & finite
        total += torch.where(valid.unsqueeze(-1), x, 0.0).sum(1)
        count += valid.sum(1)
        nonfinite += (mask[:, part] & ~finite).sum()
        del x
    return Embeddings(total / count.clamp(min=1).unsqueeze(-1).to(dtype), count > 0, nonfinite)
