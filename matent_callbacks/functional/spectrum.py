"""The spectrum of the token covariance, from which all other quantities are derived."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision, statistics_dtype
from matent_callbacks.functional._tokens import Tokens, prepare_tokens
from matent_callbacks.functional.sinks import counted_tokens


def spectrum(
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    center: bool = True,
    normalize: bool = True,
    exclude_sinks: bool = False,
) -> Tensor:
    r"""Eigenvalues of the unit-trace covariance of the tokens of each sequence.

    The valid tokens :math:`z_i` of a sequence are centred, :math:`z_i \leftarrow z_i - \bar z`, scaled to unit length,
    :math:`z_i \leftarrow z_i / \lVert z_i \rVert_2` (a zero row stays zero), and give
    :math:`K = \frac{1}{N} \sum_i z_i z_i^\top`, divided by its trace (Wei et al., arXiv 2401.17139, section 3).
    The non-zero eigenvalues of K and of the Gram matrix of the tokens are the same, so the smaller of the two is
    decomposed.

    Args:
        hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``. float64 is computed in float64, all else in float32.
        attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0. ``None``: all count.
            Tokens with NaN or Inf are left out as if they were masked.
        center: Subtract the mean token of each sequence.
        normalize: Scale each token to unit length.
        exclude_sinks: Leave out attention sinks, see :func:`sink_tokens`.

    Returns:
        ``(k,)`` or ``(B, k)`` with ``k = min(N or T, d)``: descending, summing to 1, zeros where the rank ends.
        All zeros where the tokens have no spread at all.

    Raises:
        TypeError: If ``hidden_states`` is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import spectrum
        >>> spectrum(torch.eye(4))
        tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    states, mask = counted_tokens(hidden_states, attention_mask, exclude_sinks=exclude_sinks)
    with full_precision(states.device):
        dtype = statistics_dtype(hidden_states)
        tokens = prepare_tokens(states, mask, center=center, normalize=normalize, dtype=dtype, alone=True)
        eigenvalues = unit_trace_eigenvalues(second_moment(tokens))
    return eigenvalues[0] if hidden_states.ndim == 2 else eigenvalues


def second_moment(tokens: Tokens) -> Tensor:
    """``(B, k, k)`` with the non-zero eigenvalues of the covariance: the Gram matrix when tokens are fewer."""
    z = tokens.values
    return z @ z.mT if z.shape[1] < z.shape[2] else z.mT @ z


def unit_trace(matrix: Tensor) -> Tensor:
    """``(..., k, k)`` divided by its trace; a zero matrix stays zero."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return matrix / torch.where(trace > 0, trace, 1.0)


def unit_trace_eigenvalues(matrix: Tensor) -> Tensor:
    """Descending eigenvalues ``(..., k)`` of a covariance over its trace; NaN where it has overflowed."""
    return over_trace(*solved(matrix))


def solved(matrix: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues ``(..., k)`` of a covariance, and its trace ``(..., 1)``.

    Only the lower triangle is read. Where the trace is not finite the eigenvalues are not those of the matrix.
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    # A covariance has its largest numbers on the diagonal, so it has overflowed where its diagonal has. On the CPU
    # reading a value costs nothing.
    if matrix.device.type != "cpu" or not math.isfinite(trace.sum()):
        unusable = ~torch.isfinite(trace).unsqueeze(-1)
        matrix = matrix.masked_fill_(unusable, 0.0) if overwrite else matrix.masked_fill(unusable, 0.0)
    # The solver has no MPS kernel; the matrix is small, so it goes to the CPU.
    solvable = matrix.cpu() if matrix.device.type == "mps" else matrix
    return torch.linalg.eigvalsh(solvable).to(matrix.device), trace


def over_trace(eigenvalues: Tensor, trace: Tensor) -> Tensor:
    """Turn the result of :func:`solved` into a spectrum: descending, of sum 1; all zeros or NaN where undefined."""
    spectrum = eigenvalues.flip(-1).clamp(min=0) / torch.where(trace > 0, trace, 1.0)
    return torch.where(torch.isfinite(trace), spectrum, torch.nan)
