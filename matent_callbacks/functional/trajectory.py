"""How sharply the path of a sequence through its layer's space turns from token to token."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import check_hidden_states, finite_rows, into_range, largest_of_rows


def curvature(hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    r"""Mean angle between successive steps along each sequence, in radians.

    The steps are :math:`v_k = z_{k+1} - z_k`, between the hidden states of neighbouring tokens, and the angles those
    between :math:`v_k` and :math:`v_{k+1}` (Hosseini & Fedorenko, "Large language models implicitly learn to straighten
    neural sentence trajectories", NeurIPS 2023). Tokens that do not count are taken out, and those on either side of
    them become neighbours. An angle at a step of length zero is left out.

    Args:
        hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``. float64 is computed in float64, all else in float32.
        attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0. ``None``: all count.
            Tokens with NaN or Inf do not.

    Returns:
        ``()`` or ``(B,)``, between 0 (a straight line) and pi (there and back); around 2 pi / 3 for unrelated tokens.
        NaN where there is no angle, as in a sequence of two tokens.

    Raises:
        TypeError: If ``hidden_states`` is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import curvature
        >>> curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 3.0]]))  # a right angle, and none
        tensor(0.7854)
    """
    states, mask = check_hidden_states(hidden_states, attention_mask)
    states = states.to(statistics_dtype(states))
    order, count = counting_first(mask & finite_rows(states))
    of_each = torch.arange(len(states), device=states.device).unsqueeze(1)
    total, number = sum_of_angles(states[of_each, order], count)
    mean = torch.where(number > 0, total / number, torch.nan)
    return mean[0] if hidden_states.ndim == 2 else mean


def counting_first(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of the tokens of ``(B, T)``, those that count first and in order, and how many do: ``(B,)``."""
    return (~valid).int().argsort(dim=1, stable=True), valid.sum(1)


def sum_of_angles(states: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum ``(B,)`` of the angles along ``(B, T, d)``, of which the first ``count`` tokens count, and their number."""
    if states.numel():
        largest = largest_of_rows(states)
        largest = torch.where(torch.isfinite(largest), largest, 0.0).amax(1)
        states = states * into_range(largest, states.dtype)[:, None, None]
    steps = states.diff(dim=1)
    length = torch.linalg.vector_norm(steps, dim=-1)
    moves = (length > 0) & torch.isfinite(length)
    steps.div_(torch.where(moves, length, 1.0).unsqueeze(-1))
    before, after = steps[:, :-1], steps[:, 1:]
    # Kahan's formula. The arc cosine of a number near 1 keeps half of the digits.
    apart = torch.linalg.vector_norm(after - before, dim=-1)
    angles = 2 * torch.atan2(apart, torch.linalg.vector_norm(after + before, dim=-1))
    place = torch.arange(angles.shape[1], device=count.device)
    turns = moves[:, :-1] & moves[:, 1:] & (place < (count - 2).unsqueeze(1))
    return torch.where(turns, angles, 0.0).sum(1), turns.sum(1)
