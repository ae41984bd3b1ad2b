"""Matrix entropy, effective rank, and the other quantities of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision, statistics_dtype
from matent_callbacks.functional._tokens import prepare_tokens
from matent_callbacks.functional.sinks import counted_tokens
from matent_callbacks.functional.spectrum import second_moment, unit_trace, unit_trace_eigenvalues


def matrix_entropy(
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    center: bool = True,
    normalize: bool = True,
    alpha: float = 1.0,
    exclude_sinks: bool = False,
) -> Tensor:
    r"""Matrix entropy of each sequence, one number each, in nats; :class:`~matent_callbacks.MatrixEntropy` is pooled.

    :math:`H(K) = -\mathrm{tr}(K \log K)` of the unit-trace covariance K of :func:`spectrum` (Wei et al.,
    arXiv 2401.17139, definition 3.2); for ``alpha`` other than 1 the Rényi entropy
    :math:`\frac{1}{1-\alpha} \log \mathrm{tr}\, K^\alpha` (Giraldo et al., arXiv 1211.2459). ``alpha=2`` is
    :math:`-\log \lVert K \rVert_F^2` and needs no decomposition.

    Args:
        hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``.
        attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0.
        center: Subtract the mean token of each sequence.
        normalize: Scale each token to unit length.
        alpha: Order of the entropy, above 0.
        exclude_sinks: Leave out attention sinks, see :func:`sink_tokens`.

    Returns:
        ``()`` or ``(B,)``, between 0 and ``log min(N - 1, d)`` (N without centring). Tokens without any spread give 0;
        a sequence with fewer than two valid tokens (one, without centring) has no covariance and gives NaN.

    Raises:
        TypeError: If ``hidden_states`` is not a floating point tensor.
        ValueError: If a shape is wrong or ``alpha`` is not above 0.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import matrix_entropy
        >>> round(matrix_entropy(torch.eye(4)).item(), 4)  # rank 3 after centring: log 3
        1.0986
    """
    check_alpha(alpha)
    states, mask = counted_tokens(hidden_states, attention_mask, exclude_sinks=exclude_sinks)
    with full_precision(states.device):
        dtype = statistics_dtype(hidden_states)
        tokens = prepare_tokens(states, mask, center=center, normalize=normalize, dtype=dtype, alone=True)
        entropy = entropy_of_matrix(second_moment(tokens), alpha=alpha)
    defined = tokens.valid.sum(-1) >= (2 if center else 1)
    entropy = torch.where(defined, entropy, torch.nan)
    return entropy[0] if hidden_states.ndim == 2 else entropy


def effective_rank(
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    center: bool = True,
    normalize: bool = True,
    alpha: float = 1.0,
    exclude_sinks: bool = False,
) -> Tensor:
    r"""Effective rank of each sequence, in dimensions: the exponential of :func:`matrix_entropy`.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007, applied to the token covariance as in Diff-eRank
    (Wei et al., NeurIPS 2024).

    Args:
        hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``.
        attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0.
        center: Subtract the mean token of each sequence.
        normalize: Scale each token to unit length.
        alpha: Order of the entropy, above 0.
        exclude_sinks: Leave out attention sinks, see :func:`sink_tokens`.

    Returns:
        ``()`` or ``(B,)``, between 1 and ``min(N - 1, d)`` (N without centring); NaN where the entropy is.

    Raises:
        TypeError: If ``hidden_states`` is not a floating point tensor.
        ValueError: If a shape is wrong or ``alpha`` is not above 0.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import effective_rank
        >>> round(effective_rank(torch.eye(4)).item(), 4)
        3.0
    """
    entropy = matrix_entropy(
        hidden_states, attention_mask, center=center, normalize=normalize, alpha=alpha, exclude_sinks=exclude_sinks
    )
    return entropy.exp()


def spectral_summary(eigenvalues: Tensor, *, num_features: int | None = None) -> dict[str, Tensor]:
    r"""Compute all quantities of one spectrum.

    With the eigenvalues scaled to sum 1 and :math:`\sigma_j = \sqrt{l_j}`:

    ============================  ===================================================================================
    ``matrix_entropy``            :math:`-\sum_j l_j \log l_j`, nats (arXiv 2401.17139)
    ``normalized_matrix_entropy`` that, divided by ``log d``
    ``effective_rank``            exp of the entropy (Roy & Vetterli 2007)
    ``renyi_2``                   :math:`-\log \sum_j l_j^2`, nats
    ``participation_ratio``       :math:`(\sum_j l_j)^2 / \sum_j l_j^2`
    ``stable_rank``               :math:`\sum_j l_j / \max_j l_j`
    ``top_share``                 :math:`\max_j l_j / \sum_j l_j`
    ``numerical_rank``            eigenvalues above ``d * eps * max`` of their dtype
    ``alpha_req``                 -slope of :math:`\log l_j` over :math:`\log j`, least squares above that threshold
                                  (Agrawal et al. 2022, alpha-ReQ); NaN for fewer than two eigenvalues
    ``rankme``                    exp of the entropy of :math:`\sigma_j / \sum \sigma` (Garrido et al. 2023, arXiv
                                  2210.02885); theirs exactly if the spectrum is uncentred and unnormalised
    ============================  ===================================================================================

    Args:
        eigenvalues: ``(..., k)``, non-negative, in descending order, of any scale.
        num_features: d, where it is more than k: the eigenvalues are those of a Gram matrix. ``None``: k.

    Returns:
        A tensor ``(...)`` for each name of the table.

    Raises:
        TypeError: If ``eigenvalues`` is not a floating point tensor.
        ValueError: If ``eigenvalues`` has no dimension.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import spectral_summary
        >>> summary = spectral_summary(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        >>> summary["effective_rank"], summary["participation_ratio"], summary["numerical_rank"]
        (tensor(2.), tensor(2.), tensor(2.))
    """
    if not isinstance(eigenvalues, Tensor) or not eigenvalues.is_floating_point():
        raise TypeError(f"`eigenvalues` must be a floating point tensor, got {_describe(eigenvalues)}.")
    if eigenvalues.ndim == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(f"`eigenvalues` must have shape (..., k) with k >= 1, got {tuple(eigenvalues.shape)}.")
    return summarized(eigenvalues, _SUMMARY, num_features=num_features)


def summarized(eigenvalues: Tensor, names: Iterable[str], *, num_features: int | None = None) -> dict[str, Tensor]:
    """Compute the named quantities of :func:`spectral_summary` only."""
    spectrum = _Spectrum(eigenvalues, num_features or eigenvalues.shape[-1])
    return {name: _SUMMARY[name](spectrum) for name in names}


class _Spectrum:
    """Intermediate results that several quantities share, computed on first use."""

    def __init__(self, eigenvalues: Tensor, num_features: int) -> None:
        self.num_features = num_features
        total = eigenvalues.sum(-1, keepdim=True)
        self.shares = eigenvalues / torch.where(total > 0, total, 1.0)
        self.top = self.shares[..., 0]

    @cached_property
    def entropy(self) -> Tensor:
        return entropy_of_eigenvalues(self.shares)

    @cached_property
    def squares(self) -> Tensor:
        return self.shares.square().sum(-1)

    @cached_property
    def above_noise(self) -> Tensor:
        epsilon = torch.finfo(self.shares.dtype).eps
        return self.shares > self.num_features * epsilon * self.top.unsqueeze(-1)

    def over_log_d(self) -> Tensor:
        return self.entropy / (math.log(self.num_features) if self.num_features > 1 else math.nan)

    def rankme(self) -> Tensor:
        sigma = self.shares.sqrt()
        total = sigma.sum(-1, keepdim=True).clamp(min=torch.finfo(sigma.dtype).tiny)
        return entropy_of_eigenvalues(sigma / total).exp()


_SUMMARY: dict[str, Callable[[_Spectrum], Tensor]] = {
    "matrix_entropy": lambda spectrum: spectrum.entropy,
    "normalized_matrix_entropy": _Spectrum.over_log_d,
    "effective_rank": lambda spectrum: spectrum.entropy.exp(),
    "renyi_2": lambda spectrum: renyi_2_of_squares(spectrum.squares),
    "participation_ratio": lambda spectrum: 1 / spectrum.squares,
    "stable_rank": lambda spectrum: 1 / spectrum.top,
    "top_share": lambda spectrum: spectrum.top,
    "numerical_rank": lambda spectrum: spectrum.above_noise.sum(-1).to(spectrum.shares.dtype),
    "alpha_req": lambda spectrum: _power_law_slope(spectrum.shares, spectrum.above_noise),
    "rankme": _Spectrum.rankme,
}


def entropy_of_matrix(matrix: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``(..., k, k)``, positive semi-definite, of any scale, to its entropy ``(...)``."""
    if alpha == 2.0:
        return renyi_2_of_squares(unit_trace(matrix).square().sum((-2, -1)))
    return entropy_of_eigenvalues(unit_trace_eigenvalues(matrix), alpha=alpha)


def entropy_of_eigenvalues(eigenvalues: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``(..., k)`` with sum 1 to the entropy ``(...)`` of order ``alpha``; all zeros give 0."""
    if alpha == 1.0:
        entropy: Tensor = torch.special.entr(eigenvalues).sum(-1)
        return entropy
    if alpha == 2.0:
        return renyi_2_of_squares(eigenvalues.square().sum(-1))
    if alpha == math.inf:
        top = eigenvalues[..., 0]
        return -torch.where(top > 0, top, 1.0).log()
    power_sum = eigenvalues.pow(alpha).sum(-1)
    return torch.where(power_sum > 0, power_sum, 1.0).log() / (1 - alpha)


def check_alpha(alpha: float) -> None:
    """Raise unless ``alpha`` is a usable order."""
    if not alpha > 0:
        raise ValueError(f"`alpha` must be above 0, got {alpha}.")


def renyi_2_of_squares(purity: Tensor) -> Tensor:
    """The sum of the squared shares of a spectrum to its entropy of order 2; 0, where nothing spreads, gives 0."""
    return torch.where(purity > 0, purity, 1.0).log().neg()


def _power_law_slope(eigenvalues: Tensor, above: Tensor) -> Tensor:
    index = torch.arange(1, eigenvalues.shape[-1] + 1, device=eigenvalues.device, dtype=eigenvalues.dtype)
    weight = above.to(eigenvalues.dtype)
    count = weight.sum(-1, keepdim=True)
    x = index.log()
    y = torch.where(above, eigenvalues, 1.0).log()
    x_centred = x - (weight * x).sum(-1, keepdim=True) / count
    slope = (weight * x_centred * y).sum(-1) / (weight * x_centred.square()).sum(-1)
    return -slope


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
