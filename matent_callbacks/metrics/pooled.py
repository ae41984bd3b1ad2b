"""Entropy and effective rank of one covariance over all tokens of all batches and ranks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Center, Moments, attainable_rank, empty_moments
from matent_callbacks.accumulate.pooled_tokens import KeptTokens, PooledTokens, entropy_of_lower
from matent_callbacks.accumulate.reduction import agreed_widths, reduce_moments
from matent_callbacks.accumulate.sequence_mean import divide_by_log
from matent_callbacks.accumulate.sequences import in_groups
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.metrics._base import NORMALIZE_BY, TokenMetric

# Tokens are kept as long as they take no more memory than the packed scatter would.
_KEEP = 0.5


class _PooledState(NamedTuple):
    """The torchmetrics states: the fields of :class:`.Moments` and of :class:`.KeptTokens`."""

    num_tokens: Tensor
    num_sequences: Tensor
    num_nonfinite: Tensor
    mean: Tensor
    scatter: Tensor
    kept: Tensor
    kept_valid: Tensor
    """``(N,)`` int64, since gloo cannot send bool."""


class _PooledMetric(TokenMetric):
    """A metric of one covariance of all tokens, with the content of :class:`.PooledTokens` as torchmetrics states."""

    num_tokens: Tensor
    num_sequences: Tensor
    num_nonfinite: Tensor
    mean: Tensor
    scatter: Tensor
    kept: Tensor
    kept_valid: Tensor
    _state_type = _PooledState
    _counters = ("settings", "num_tokens", "num_sequences", "num_nonfinite", "kept_valid")

    def __init__(
        self,
        *,
        center: Center = "sequence",
        normalize: bool = True,
        alpha: float = 1.0,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
        exclude_sinks: bool = False,
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
            exclude_sinks=exclude_sinks,
            **kwargs,
        )
        self.center = center
        self._add_states(self._states_of(PooledTokens(center, empty_moments(num_features or 0, dtype=dtype))))

    @property
    def _state_dtype(self) -> torch.dtype:
        return self.scatter.dtype

    def _known_features(self) -> int | None:
        return self.scatter.shape[1] - 1 or None

    def _accumulate(self, states: Tensor, mask: Tensor) -> None:
        pooled = self._pooled(self._state)
        try:
            for sequences in in_groups(states, mask, dtype=self._state_dtype):
                pooled.update(sequences, normalize=self.normalize)
        except BaseException:
            # A part of the batch is in the scatter already, but not in the counts.
            self.reset()
            raise
        self._state = self._states_of(pooled)

    def _join(self, other: _PooledState) -> None:
        pooled, incoming = self._pooled(self._state), self._pooled(other)
        mine, theirs = pooled.num_features, incoming.num_features
        if mine and theirs and mine != theirs:
            raise ValueError(f"`incoming_state` must have {mine} features, got {theirs}.")
        pooled.merge(incoming)
        self._state = self._states_of(pooled)

    def _all_reduce(self, group: Any) -> None:
        moments = self._pooled(self._state).moments()
        widths = agreed_widths([moments], moments.scatter.device, group)
        (common,) = reduce_moments([moments], widths, group=group)
        if common is None:
            raise ValueError("`hidden_states` must have as many features on every rank as on the others.")
        self._state = self._states_of(PooledTokens(self.center, common))

    def _pooled(self, state: _PooledState) -> PooledTokens:
        *moments, kept, valid = state
        tokens = [KeptTokens(kept, valid > 0)] if len(kept) else []
        return PooledTokens(self.center, Moments(*moments), tokens, keep=_KEEP)

    def _states_of(self, pooled: PooledTokens) -> _PooledState:
        moments, kept = pooled.parts()
        return _PooledState(*moments, kept.values, kept.valid.to(torch.int64))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Updates write into the scatter, and torchmetrics takes the very tensors of the caller's dict as states.
        self.scatter = self.scatter.clone()

    def _entropy(self) -> Tensor:
        # Without a token there is no entropy. This is the only device-to-host sync.
        if self.num_tokens == 0:
            return torch.full((), torch.nan, dtype=self._state_dtype, device=self.scatter.device)
        with full_precision(self.scatter.device):
            entropy = entropy_of_lower(self._pooled(self._state).matrix().lower(), alpha=self.alpha)
        return entropy.to(self._state_dtype)


class MatrixEntropy(_PooledMetric):
    r"""Matrix entropy of all tokens pooled, in nats; ``functional.matrix_entropy`` is of each sequence.

    One covariance is accumulated over every token of every update and every rank, by moments that are merged pairwise
    (Chan, Golub & LeVeque 1979), so the value does not depend on how the tokens were split. The state is half of that
    symmetric matrix, d(d + 1)/2 numbers, or the tokens themselves while there are not more than d/2 of them.
    :math:`H = -\mathrm{tr}(K \log K)` of the covariance K divided by its trace (Wei et al., arXiv 2401.17139). For
    one sequence this is the paper's number; for a data set the paper takes the mean over sequences instead, which is
    :class:`SequenceMatrixEntropy`.

    Args:
        center: What is subtracted from the tokens: the mean of their ``"sequence"`` (the paper), the mean of all
            tokens (``"global"``), or nothing (``None``).
        normalize: Scale each token to unit length (after centring by sequence, before centring globally).
        alpha: Order of the Rényi entropy; 1 is the von Neumann entropy above.
        normalize_by: ``None``: nats. ``"log_d"``: divide by log d, as version 1 of the paper does. ``"log_rank"``:
            divide by the log of the rank that this number of centred tokens can attain, so that 1 can be reached.
        dtype: Of the statistics, float32 or float64, whatever the hidden states come in.
        num_features: d, if it is to be fixed before the first update; otherwise learnt from it.
        exclude_sinks: Leave out attention sinks, see :func:`~matent_callbacks.functional.sink_tokens`.
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
        exclude_sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        if normalize_by not in NORMALIZE_BY:
            raise ValueError(f"`normalize_by` must be one of {NORMALIZE_BY}, got {normalize_by!r}.")
        super().__init__(
            center=center,
            normalize=normalize,
            alpha=alpha,
            dtype=dtype,
            num_features=num_features,
            exclude_sinks=exclude_sinks,
            **kwargs,
        )
        self.normalize_by = normalize_by

    def compute(self) -> Tensor:
        """Entropy of everything seen, ``()``, in nats or as ``normalize_by`` says."""
        entropy = self._entropy()
        if self.normalize_by is None:
            return entropy
        moments, _ = self._pooled(self._state).parts()
        rank = attainable_rank(moments, center=self.center)
        return divide_by_log(entropy, rank, moments.num_features, normalize_by=self.normalize_by)


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
        exclude_sinks: Leave out attention sinks, see :func:`~matent_callbacks.functional.sink_tokens`.
        **kwargs: For :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or d changes between updates.
        TypeError: If hidden states are not floating point.

    Shapes:
        ``update(hidden_states, attention_mask=None)``: ``(N, d)`` and ``(N,)``, or ``(B, T, d)`` and ``(B, T)``.
        ``compute()``: ``()``, from 1 to ``min(N - 1, d)`` (N without centring); NaN while no token has been seen.

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
