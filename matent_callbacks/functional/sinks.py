"""Attention sinks: the few tokens of a sequence that are many times as long as all others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import check_hidden_states, into_range, largest_of_rows

# How many times as long as the geometric mean of its sequence a sink is. In SmolLM2-135M and Gemma 3 270M sinks are 4.6
# to 186 times as long (benchmarks/pretrained.py).
_LOG_RATIO = math.log(4.0)
# Sinks are few: 8 tokens of a sequence at most, or one in 64 of a long one, but never more than one in 4. Where more
# tokens are long, they are another kind of token, as those of an image may be beside a short text.
_FEW, _ONE_IN, _AT_MOST_ONE_IN = 8, 64, 4


def sink_tokens(hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    r"""Which tokens are attention sinks: longer than 4 times the geometric mean of the lengths in their sequence.

    In pretrained language models the first token, and some delimiters, are up to some hundred times as long as all
    others in the middle layers ("Massive Activations in Large Language Models", Sun et al., COLM 2024,
    arXiv:2402.17762). The mean of a sequence is then the direction of its sink, and once that is subtracted all other
    tokens lie almost along one line: their spectrum describes one token.

    The geometric mean :math:`\exp(\frac{1}{N} \sum_i \log \|z_i\|)` is hardly moved by one long token. If more than
    :math:`\min(\max(8, N / 64), N / 4)` of N tokens are that long, rounded down, none is a sink: then they are a kind
    of token.

    Args:
        hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``.
        attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0. ``None``: all count.
            Tokens with NaN or Inf do not.

    Returns:
        Bool, ``(N,)`` or ``(B, T)``: true for sinks.

    Raises:
        TypeError: If ``hidden_states`` is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import sink_tokens
        >>> hidden_states = torch.ones(6, 8)
        >>> hidden_states[0] *= 100
        >>> sink_tokens(hidden_states)
        tensor([ True, False, False, False, False, False])
    """
    states, mask = check_hidden_states(hidden_states, attention_mask)
    sinks = sinks_among(log_norms(states, statistics_dtype(states)), mask)
    return sinks[0] if hidden_states.ndim == 2 else sinks


def log_norms(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithms ``(...)`` of the lengths of ``(..., d)``: -inf for a zero, NaN or inf where a row holds one."""
    x = states.to(dtype)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    # A look at a value costs nothing on the CPU. Elsewhere tokens beyond the range of squares have no length.
    if norms.device.type == "cpu" and bool(((norms < torch.finfo(dtype).tiny ** 0.25) | norms.isinf()).any()):
        factor = into_range(largest_of_rows(x), dtype)
        norms = torch.linalg.vector_norm(x * factor.unsqueeze(-1), dim=-1)
        return norms.log() - factor.log()
    return norms.log()


def sinks_among(log_norms: Tensor, mask: Tensor, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Sinks ``(B, T)`` among the tokens of ``mask``, from their :func:`log_norms`.

    ``over_ranks`` is given sums ``(..., B)``, one for each sequence, and returns those over all ranks that share it.
    """
    counts = mask & torch.isfinite(log_norms)
    logs = torch.where(counts, log_norms, 0.0)
    total, number = over_ranks(torch.stack([logs.sum(1, dtype=torch.float64), counts.sum(1).double()]))
    long: Tensor = counts & (log_norms > (total / number.clamp(min=1) + _LOG_RATIO).unsqueeze(1))
    most = (number // _ONE_IN).clamp(min=_FEW).minimum(number // _AT_MOST_ONE_IN)
    are_few: Tensor = over_ranks(long.sum(1).double()) <= most
    return long & are_few.unsqueeze(1)
