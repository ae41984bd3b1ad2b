"""The paper's data-set quantity: one entropy for each sequence, and their running mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.sequences import SequenceEntropies, in_groups
from matent_callbacks.functional._precision import full_precision


class SequenceMean(NamedTuple):
    """Mean of the entropy, or of another number, over the sequences seen so far, or of a vector over the tokens."""

    num_sequences: Tensor
    """``()`` int64: sequences that have one (a covariance takes two valid tokens; one, without centring). In a mean
    that is weighted by tokens, the tokens."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    mean: Tensor
    """``()``, nats for an entropy; or ``(d,)``, and ``(0,)`` as long as d is not known."""


def empty_sequence_mean(*, dtype: torch.dtype, device: torch.device | str = "cpu") -> SequenceMean:
    """The mean of no sequences."""
    return SequenceMean(
        num_sequences=torch.zeros((), dtype=torch.int64, device=device),
        num_nonfinite=torch.zeros((), dtype=torch.int64, device=device),
        mean=torch.zeros((), dtype=dtype, device=device),
    )


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


def mean_entropy(
    states: Tensor,
    mask: Tensor,
    *,
    dtype: torch.dtype,
    center: bool = True,
    normalize: bool = True,
    alpha: float = 1.0,
    normalize_by: str | None = None,
) -> SequenceMean:
    """Mean entropy of the sequences of ``(B, T, d)``. To be called with autocast and TF32 switched off."""
    mean = empty_sequence_mean(dtype=dtype, device=states.device)
    for sequences in in_groups(states, mask, dtype=dtype):
        found = sequences.entropies_of(center=center, normalize=normalize, alpha=alpha)
        own = mean_of_sequences(found, states.shape[-1], center=center, normalize_by=normalize_by)
        mean = merge_sequence_means(mean, own)
    return mean


def stage_mean(hidden_states: Tensor, mask: Tensor, *, dtype: torch.dtype) -> SequenceMean:
    """Mean entropy of one batch of hidden states ``(B, T, d)``, which were checked before."""
    with torch.no_grad(), full_precision(hidden_states.device):
        return mean_entropy(hidden_states, mask, dtype=dtype)


def merge_sequence_means(a: SequenceMean, b: SequenceMean) -> SequenceMean:
    """Mean over the sequences of both.

    It is updated as a running mean: a sum over many sequences would stop growing in float32.
    """
    count = a.num_sequences + b.num_sequences
    if a.mean.shape != b.mean.shape:  # one of them has seen nothing
        wide = a.mean if a.mean.numel() else b.mean
        a, b = (m if m.mean.numel() else m._replace(mean=torch.zeros_like(wide)) for m in (a, b))
    mean = a.mean + (b.mean - a.mean) * (b.num_sequences / count.clamp(min=1).to(a.mean.dtype))
    return SequenceMean(count, a.num_nonfinite + b.num_nonfinite, mean)


def divide_by_log(entropy: Tensor, rank: Tensor, num_features: int, *, normalize_by: str) -> Tensor:
    """Entropy divided by log d (``"log_d"``, as in the paper) or by the log of the attainable rank (``"log_rank"``).

    NaN where that log is 0.
    """
    bound = torch.full_like(entropy, num_features) if normalize_by == "log_d" else rank.clamp(max=num_features)
    scale = bound.to(entropy.dtype).log()
    return torch.where(scale > 0, entropy / scale, torch.nan)
