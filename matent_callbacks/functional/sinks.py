"""Attention sinks: the few tokens of a sequence that are many times as long as all others."""

from __future__ import annotations

import math
from typing import NamedTuple

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

    The geometric mean :math:`\exp(\frac{1}{N} \sum_i \log \lVert z_i \rVert)` is hardly moved by one long token. If
    more than :math:`\min(\max(8, N / 64), N / 4)` of N tokens are that long, rounded down, none is a sink: then they
    are a kind of token.

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
    sinks = _sinks(*check_hidden_states(hidden_states, attention_mask))
    return sinks[0] if hidden_states.ndim == 2 else sinks


def counted_tokens(
    hidden_states: Tensor, attention_mask: Tensor | None, *, exclude_sinks: bool
) -> tuple[Tensor, Tensor]:
    """Return hidden states as ``(B, T, d)`` and as bool ``(B, T)`` which count, or raise naming the argument."""
    states, mask = check_hidden_states(hidden_states, attention_mask)
    return states, mask & ~_sinks(states, mask) if exclude_sinks else mask


def _sinks(states: Tensor, mask: Tensor) -> Tensor:
    return token_norms(log_norms(states, statistics_dtype(states)), mask).sinks


def log_norms(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithms ``(...)`` of the lengths of ``(..., d)``: -inf for a zero, NaN or inf where a row holds one."""
    x = states.to(dtype)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    # A look at a value costs nothing on the CPU. Elsewhere tokens beyond the range of squares have no length.
    if norms.device.type == "cpu" and norms.numel():
        least, greatest = (number.item() for number in norms.aminmax())
        if not (least >= torch.finfo(dtype).tiny ** 0.25 and greatest < math.inf):
            factor = into_range(largest_of_rows(x), dtype)
            norms = torch.linalg.vector_norm(x * factor.unsqueeze(-1), dim=-1)
            return norms.log() - factor.log()
    return norms.log()


class TokenNorms(NamedTuple):
    """The lengths of the tokens of some sequences, and which of them are sinks."""

    logs: Tensor
    """``(B, T)``: from :func:`log_norms`."""
    counts: Tensor
    """``(B, T)`` bool: tokens that count and have a length."""
    num_tokens: Tensor
    """``(B,)``: how many of these a sequence has, on all ranks that share it."""
    mean: Tensor
    """``(B,)``: the mean of ``logs`` over a sequence, the logarithm of the geometric mean of the lengths."""
    sinks: Tensor
    """``(B, T)`` bool."""
    num_sinks: Tensor
    """``(B,)`` int64."""

    @property
    def log_ratios(self) -> Tensor:
        """``(B, T)``: logarithms of how many times as long as that geometric mean a token is."""
        return self.logs - self.mean.unsqueeze(1)


def sums_of_logs(logs: Tensor, counts: Tensor) -> Tensor:
    """Sum of ``logs`` over the tokens of each sequence that count, and their number: ``(2, B)``."""
    dtype = torch.float32 if logs.device.type == "mps" else torch.float64  # MPS has no other
    return torch.stack([torch.where(counts, logs, 0.0).sum(1, dtype=dtype), counts.sum(1, dtype=dtype)])


def long_tokens(logs: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    """Tokens ``(B, T)`` that are long enough for a sink, with the ``sums`` of whole sequences."""
    long: Tensor = counts & (logs > (_mean(sums) + _LOG_RATIO).unsqueeze(1))
    return long


def most_sinks(num_tokens: Tensor) -> Tensor:
    """How many long tokens a sequence of so many tokens may have for them to be sinks."""
    return (num_tokens // _ONE_IN).clamp(min=_FEW).minimum(num_tokens // _AT_MOST_ONE_IN)


def with_sinks(logs: Tensor, counts: Tensor, sums: Tensor, long: Tensor, num_long: Tensor) -> TokenNorms:
    """Put it together; ``num_long`` ``(B,)`` is the number of long tokens of a whole sequence."""
    are_few: Tensor = num_long <= most_sinks(sums[1])
    num_sinks = (num_long * are_few).to(torch.int64)
    return TokenNorms(logs, counts, sums[1], _mean(sums), long & are_few.unsqueeze(1), num_sinks)


def may_have_sinks(logs: Tensor) -> bool:
    """Whether some token may be a sink, by one look at the least and the greatest of all :func:`log_norms`."""
    least, greatest = (number.item() for number in logs.aminmax())
    # The geometric mean is not below the shortest. NaN compares as false.
    return not greatest - least <= _LOG_RATIO


def token_norms(logs: Tensor, mask: Tensor) -> TokenNorms:
    """Find the sinks among the tokens of ``mask`` ``(B, T)``, of whole sequences."""
    counts = mask & torch.isfinite(logs)
    sums = sums_of_logs(logs, counts)
    long = long_tokens(logs, counts, sums)
    return with_sinks(logs, counts, sums, long, long.sum(1))


def _mean(sums: Tensor) -> Tensor:
    return sums[0] / sums[1].clamp(min=1)
