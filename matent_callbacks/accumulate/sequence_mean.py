"""The paper's data-set quantity: one entropy for each sequence, and their running mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.pieces import LongSequence, is_long, sequences_at_a_time, whole_sequences
from matent_callbacks.accumulate.pooled_tokens import PooledTokens, entropy_of_lower
from matent_callbacks.accumulate.symmetric import lower_triangle
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional.entropy import entropy_of_matrix
from matent_callbacks.functional.spectrum import second_moment


class SequenceEntropies(NamedTuple):
    """Entropies of the sequences of one batch."""

    entropy: Tensor
    """``(B,)``, nats; arbitrary for a sequence with too few tokens to have a covariance."""
    num_tokens: Tensor
    """``(B,)`` int64: tokens that are neither masked nor left out."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    trace: Tensor
    """``(B,)``: the sum of the squared lengths of the tokens; for unit lengths, how many do not equal their mean."""


class SequenceMean(NamedTuple):
    """Mean of the entropy, or of another number, over the sequences seen so far."""

    num_sequences: Tensor
    """``()`` int64: sequences that have one (a covariance takes two valid tokens; one, without centring). In a mean
    that is weighted by tokens, the tokens."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    mean: Tensor
    """``()``, nats for an entropy."""


def empty_sequence_mean(*, dtype: torch.dtype, device: torch.device | str = "cpu") -> SequenceMean:
    """The mean of no sequences."""
    return SequenceMean(
        num_sequences=torch.zeros((), dtype=torch.int64, device=device),
        num_nonfinite=torch.zeros((), dtype=torch.int64, device=device),
        mean=torch.zeros((), dtype=dtype, device=device),
    )


def sequence_entropies(
    states: Tensor,
    mask: Tensor,
    *,
    center: bool,
    normalize: bool,
    dtype: torch.dtype,
    alpha: float = 1.0,
    pooled: PooledTokens | None = None,
) -> SequenceEntropies:
    """Entropy of each sequence of ``(B, T, d)``, a few sequences at a time.

    To be called with autocast and TF32 switched off. All tokens are added to ``pooled`` as well, so that they have to
    be centred and normalised only once for both.
    """
    if pooled is not None:
        pooled.reserve(states)
    found, alone = [], pooled is None
    for some, valid in sequences_at_a_time(states, mask, dtype):
        if is_long(some, dtype):
            sequence = LongSequence(some[0], valid[0], center=center, normalize=normalize, dtype=dtype, alone=alone)
            found.append(_of_long_sequence(sequence, alpha, pooled))
            continue
        piece = whole_sequences(some, valid, center=center, normalize=normalize, dtype=dtype, alone=alone)
        if pooled is not None:
            pooled.add(piece)
        matrix = second_moment(piece.tokens)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        entropy = entropy_of_matrix(matrix, alpha=alpha)
        found.append(SequenceEntropies(entropy, piece.tokens.valid.sum(-1), piece.tokens.nonfinite, trace))
        del matrix
        del piece
    if len(found) == 1:
        return found[0]
    entropies, counts, nonfinite, traces = zip(*found, strict=True)
    return SequenceEntropies(torch.cat(entropies), torch.cat(counts), torch.stack(nonfinite).sum(), torch.cat(traces))


def _of_long_sequence(sequence: LongSequence, alpha: float, pooled: PooledTokens | None) -> SequenceEntropies:
    if sequence.has_fewer_tokens_than_features:
        lower = sequence.gram()
        trace = lower.trace()
        entropy = entropy_of_lower(lower, alpha=alpha)
        del lower
        if pooled is not None:
            for piece in sequence.pieces():
                pooled.add(piece)
                del piece
    else:
        moments = sequence.moments()
        lower = lower_triangle(moments.scatter)
        if pooled is not None:
            pooled.add_moments(moments)
        del moments  # before the solver makes a copy of the matrix
        trace = lower.trace()
        entropy = entropy_of_lower(lower, alpha=alpha)
    count = sequence.valid.sum().unsqueeze(0)
    return SequenceEntropies(entropy.unsqueeze(0), count, sequence.nonfinite, trace.unsqueeze(0))


def mean_of_sequences(
    found: SequenceEntropies, num_features: int, *, center: bool, normalize_by: str | None = None
) -> SequenceMean:
    """Mean over the sequences that have a covariance; ``normalize_by`` is as for :func:`divide_by_log`."""
    entropy, num_tokens, num_nonfinite, _ = found
    if normalize_by is not None:
        entropy = divide_by_log(entropy, num_tokens - int(center), num_features, normalize_by=normalize_by)
    defined = num_tokens >= 1 + int(center)
    total = torch.where(defined, entropy, 0.0).sum()
    return SequenceMean(defined.sum(), num_nonfinite, total / defined.sum().clamp(min=1))


def mean_by_tokens(found: SequenceEntropies) -> SequenceMean:
    """Mean over the tokens of the entropies of their sequences, which were centred and scaled to unit length.

    A token that equals the mean of its sequence contributes to no covariance, and does not count: so the covariance of
    all tokens is the mean of those of the sequences, with the same weights.
    """
    weight = found.trace.round()
    total = torch.where(weight > 0, found.entropy * weight, 0.0).sum()
    count = weight.sum()
    return SequenceMean(count.to(torch.int64), found.num_nonfinite, total / count.clamp(min=1))


def stage_mean(hidden_states: Tensor, mask: Tensor, *, dtype: torch.dtype) -> SequenceMean:
    """Mean entropy of one batch of hidden states ``(B, T, d)``, which were checked before."""
    with torch.no_grad(), full_precision(hidden_states.device):
        found = sequence_entropies(hidden_states, mask, center=True, normalize=True, dtype=dtype)
        return mean_of_sequences(found, hidden_states.shape[-1], center=True)


def merge_sequence_means(a: SequenceMean, b: SequenceMean) -> SequenceMean:
    """Mean over the sequences of both.

    It is updated as a running mean: a sum over many sequences would stop growing in float32.
    """
    count = a.num_sequences + b.num_sequences
    mean = a.mean + (b.mean - a.mean) * (b.num_sequences / count.clamp(min=1).to(a.mean.dtype))
    return SequenceMean(count, a.num_nonfinite + b.num_nonfinite, mean)


def divide_by_log(entropy: Tensor, rank: Tensor, num_features: int, *, normalize_by: str) -> Tensor:
    """Entropy divided by log d (``"log_d"``, as in the paper) or by the log of the attainable rank (``"log_rank"``).

    NaN where that log is 0.
    """
    bound = torch.full_like(entropy, num_features) if normalize_by == "log_d" else rank.clamp(max=num_features)
    scale = bound.to(entropy.dtype).log()
    return torch.where(scale > 0, entropy / scale, torch.nan)
