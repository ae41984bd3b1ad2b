"""The paper's data-set quantity: a running mean of one entropy per sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import Tokens, prepare_tokens
from matent_callbacks.functional.entropy import entropy_of_matrix
from matent_callbacks.functional.spectrum import second_moment


class SequenceMean(NamedTuple):
    """Mean entropy of the sequences seen so far."""

    num_sequences: Tensor
    """``()`` int64: sequences with a covariance (two valid tokens; one, without centring)."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    mean: Tensor
    """``()``, nats."""


def empty_sequence_mean(*, dtype: torch.dtype, device: torch.device | str = "cpu") -> SequenceMean:
    """The mean of no sequences."""
    return SequenceMean(
        num_sequences=torch.zeros((), dtype=torch.int64, device=device),
        num_nonfinite=torch.zeros((), dtype=torch.int64, device=device),
        mean=torch.zeros((), dtype=dtype, device=device),
    )


def sequence_mean(tokens: Tokens, *, center: bool, alpha: float = 1.0, normalize_by: str | None = None) -> SequenceMean:
    """Mean over the sequences of one batch; ``normalize_by`` divides each entropy by ``log_d`` or ``log_rank``."""
    count = tokens.valid.sum(-1)
    entropy = entropy_of_matrix(second_moment(tokens), alpha=alpha)
    if normalize_by is not None:
        entropy = divide_by_log(entropy, count - int(center), tokens.values.shape[-1], normalize_by=normalize_by)
    defined = count >= 1 + int(center)
    total = torch.where(defined, entropy, 0.0).sum()
    return SequenceMean(defined.sum(), tokens.nonfinite, total / defined.sum().clamp(min=1))


def stage_mean(hidden_states: Tensor, mask: Tensor, *, dtype: torch.dtype) -> SequenceMean:
    """The paper's data-set quantity of checked hidden states ``(B, T, d)``."""
    with torch.no_grad(), full_precision(hidden_states.device):
        tokens = prepare_tokens(hidden_states, mask, center=True, normalize=True, dtype=dtype)
        return sequence_mean(tokens, center=True)


def merge_sequence_means(a: SequenceMean, b: SequenceMean) -> SequenceMean:
    """Mean over the union; a running mean, since a long sum in float32 stops growing."""
    count = a.num_sequences + b.num_sequences
    mean = a.mean + (b.mean - a.mean) * (b.num_sequences / count.clamp(min=1).to(a.mean.dtype))
    return SequenceMean(count, a.num_nonfinite + b.num_nonfinite, mean)


def divide_by_log(entropy: Tensor, rank: Tensor, num_features: int, *, normalize_by: str) -> Tensor:
    """Entropy over ``log d`` (the paper) or over the log of the attainable rank; NaN where that log is 0."""
    bound = torch.full_like(entropy, num_features) if normalize_by == "log_d" else rank.clamp(max=num_features)
    scale = bound.to(entropy.dtype).log()
    return torch.where(scale > 0, entropy / scale, torch.nan)
