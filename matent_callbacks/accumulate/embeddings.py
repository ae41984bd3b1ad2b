"""Computes one vector per sequence: the mean, the last or the first of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Embedding
from matent_callbacks.accumulate.pieces import rows_of_a_piece, slices
from matent_callbacks.accumulate.sequences import Sequences, Vectors
from matent_callbacks.functional._tokens import largest_of_rows

_SHRUNK = 2.0**-30


class Embeddings(NamedTuple):
    """The vectors of some sequences."""

    values: Tensor
    """``(n, d)``; they may hold NaN or Inf, and are arbitrary where they do not count."""
    valid: Tensor
    """``(n,)`` bool: sequences of at least one token that counts."""
    nonfinite: Tensor
    """``()`` int64: tokens left out of the vectors because of NaN or Inf."""


def embeddings(sequences: Sequences, embedding: Embedding) -> Iterator[Embeddings]:
    """Yield the vectors of some sequences, in the dtype of the statistics, or in float64 if the states are."""
    if sequences.vectors is None and embedding == "mean":
        yield sequences.once(_means)
        return
    values, valid = sequences.vectors or _chosen(sequences, embedding)
    dtype = torch.promote_types(values.dtype, sequences.dtype)
    for some in slices(len(values), rows_of_a_piece(values.shape[-1], sequences.dtype)):
        # A token that stands for its sequence has no substitute: with NaN or Inf the sequence is left out.
        yield Embeddings(values[some].to(dtype), valid[some], valid.new_zeros((), dtype=torch.int64))


def _chosen(sequences: Sequences, embedding: Embedding) -> Vectors:
    mask = sequences.mask_of_whole
    place = torch.arange(mask.shape[1], device=mask.device)
    if embedding == "last":
        chosen = torch.where(mask, place, 0).amax(1)
    else:
        chosen = torch.where(mask, place, mask.shape[1] - 1).amin(1)
    return Vectors(sequences.states[torch.arange(len(mask), device=mask.device), chosen], mask.any(1))


def _means(sequences: Sequences) -> Embeddings:
    """Compute the means of sequences that fit into the work space, or of one that does not, part by part."""
    states, mask = sequences.states, sequences.mask_of_whole
    # float64 may be out of the range of float32.
    dtype = torch.promote_types(states.dtype, sequences.dtype)
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
