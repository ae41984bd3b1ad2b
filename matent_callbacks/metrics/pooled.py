"""Entropy and effective rank of one covariance over all tokens of all batches and ranks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import (
    Center,
    Moments,
    attainable_rank,
    covariance,
    empty_moments,
    merge_moments,
    token_moments,
)
from matent_callbacks.accumulate.reduction import all_reduce_moments
from matent_callbacks.accumulate.sequence_mean import divide_by_log
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import Tokens
from matent_callbacks.functional.entropy import entropy_of_matrix
from matent_callbacks.metrics._base import NORMALIZE_BY, TokenMetric


class _PooledMetric(TokenMetric):
    """Holds :class:`Moments` as torchmetrics states, under the names that its fields have."""

    num_tokens: Tensor
    num_sequences: Tensor
    num_nonfinite: Tensor
    mean: Tensor
    scatter: Tensor
    _state_type = Moments
    _counters = ("settings", "num_tokens", "num_sequences", "num_nonfinite")

    def __init__(
        self,
        *,
        center: Center = "sequence",
        normalize: bool = True,
        alpha: float = 1.0,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        if center not in ("sequence", "global", None):
            raise ValueError(f"`center` must be 'sequence', 'global' or None, got {center!r}.")
        super().__init__(
            center_sequences=center == "sequence",
            normalize=normalize,
            alpha=alpha,
            dtype=dtype,
            num_features=num_features,
            **kwargs,
        )
        self.center = center
        self._add_states(empty_moments(num_features or 0, dtype=dtype))

    @property
    def _state_dtype(self) -> torch.dtype:
        return self.mean.dtype

    def _known_features(self) -> int | None:
        return self.mean.shape[0] or None

    def _accumulate(self, tokens: Tokens) -> None:
        self._join(token_moments(tokens))

    def _join(self, other: Moments) -> None:
        mine, theirs = self.mean.shape[0], other.mean.shape[0]
        if mine and theirs and mine != theirs:
            raise ValueError(f"`incoming_state` must have {mine} features, got {theirs}.")
        if not theirs:
            return
        self._state = merge_moments(self._state, other) if mine else other

    def _all_reduce(self, group: Any) -> None:
        (self._state,) = all_reduce_moments([self._state], group)

    def _entropy(self) -> Tensor:
        # The one look at a value on the device: no token, no entropy.
        if self.num_tokens == 0:
            return torch.full((), torch.nan, dtype=self.mean.dtype, device=self.mean.device)
        with full_precision(self.mean.device):
            entropy = entropy_of_matrix(covariance(self._state, center=self.center), alpha=self.alpha)
        return entropy.to(self.mean.dtype)


class MatrixEntropy(_PooledMetric):
    r"""Matrix entropy of the covariance of all tokens, in nats.

    One covariance is accumulated over every token of every update and every rank, by moments that are merged pairwise
    (Chan, Golub & LeVeque 1979), so the value does not depend on how the tokens were split. Memory is O(d^2).
    :math:`H = -\mathrm{tr}(K \log K)` of the covariance K divided by its trace (Wei et al., arXiv 2401.17139). For
    one sequence this is the paper's number; for a data set the paper takes the mean over sequences instead, which is
    :class:`SequenceMatrixEntropy`.

    Args:
        center: What is subtracted from the tokens: the mean of their ``"sequence"`` (the paper), the mean of all
            tokens (``"global"``), or nothing (``None``).
        normalize: Scale each token to unit length (after centring by sequence, before centring globally).
        alpha: Order of the Rényi entropy; 1 is the von Neumann entropy above.
        normalize_by: ``None``: nats. ``"log_d"``: divide by log d, as version 1 of the paper does. ``"log_rank"``:
            divide by the log of the rank that so many centred tokens can attain, so that 1 can be reached.
        dtype: Of the statistics, float32 or float64, whatever the hidden states come in.
        num_features: d, if it is to be fixed before the first update; otherwise learnt from it.
        **kwargs: For :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or d changes between updates.
        TypeError: If hidden states are not floating point.

    Shapes:
        ``update(hidden_states, attention_mask=None)``: ``(N, d)`` and ``(N,)``, or ``(B, T, d)`` and ``(B, T)``.
        ``compute()``: ``()``; NaN while no token has been seen.

    Example:
        >>> import torch
        >>> from matent_callbacks import MatrixEntropy
        >>> metric = MatrixEntropy()
        >>> metric.update(torch.eye(4))
        >>> round(metric.compute().item(), 4)  # rank 3 after centring: log 3
        1.0986
    """

    def __init__(
        self,
        *,
        center: Center = "sequence",
        normalize: bool = True,
        alpha: float = 1.0,
        normalize_by: Literal["log_d", "log_rank"] | None = None,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        if normalize_by not in NORMALIZE_BY:
            raise ValueError(f"`normalize_by` must be one of {NORMALIZE_BY}, got {normalize_by!r}.")
        super().__init__(
            center=center, normalize=normalize, alpha=alpha, dtype=dtype, num_features=num_features, **kwargs
        )
        self.normalize_by = normalize_by

    def compute(self) -> Tensor:
        """Entropy of everything seen, ``()``, in nats or as ``normalize_by`` says."""
        entropy = self._entropy()
        if self.normalize_by is None:
            return entropy
        rank = attainable_rank(self._state, center=self.center)
        return divide_by_log(entropy, rank, self.mean.shape[0], normalize_by=self.normalize_by)


class EffectiveRank(_PooledMetric):
    """Effective rank of the covariance of all tokens, in dimensions: exp of :class:`MatrixEntropy`.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007. Shares its state with :class:`MatrixEntropy` in a
    ``torchmetrics.MetricCollection``.

    Args:
        center: ``"sequence"``, ``"global"`` or ``None``, as in :class:`MatrixEntropy`.
        normalize: Scale each token to unit length.
        alpha: Order of the Rényi entropy.
        dtype: Of the statistics, float32 or float64.
        num_features: d, if it is to be fixed before the first update.
        **kwargs: For :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or d changes between updates.
        TypeError: If hidden states are not floating point.

    Shapes:
        ``update(hidden_states, attention_mask=None)``: ``(N, d)`` and ``(N,)``, or ``(B, T, d)`` and ``(B, T)``.
        ``compute()``: ``()``, from 1 to ``min(N - 1, d)``; NaN while no token has been seen.

    Example:
        >>> import torch
        >>> from matent_callbacks import EffectiveRank
        >>> metric = EffectiveRank(center=None)
        >>> metric.update(torch.eye(4))
        >>> round(metric.compute().item(), 4)
        4.0
    """

    def compute(self) -> Tensor:
        """Effective rank of everything seen, ``()``, in dimensions."""
        return self._entropy().exp()
