"""The paper's data-set quantities: one entropy per sequence, then the mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from matent_callbacks.accumulate.reduction import all_reduce_sequence_means
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    mean_entropy,
    merge_sequence_means,
)
from matent_callbacks.metrics._base import NORMALIZE_BY, TokenMetric


class SequenceMatrixEntropy(TokenMetric):
    r"""Matrix entropy of a data set as the paper defines it, in nats: the mean over sequences.

    :math:`\frac{1}{S} \sum_s H(K_s)` (Wei et al., arXiv 2401.17139, section 3). The state is two numbers, and each
    sequence is decomposed on the smaller of its Gram matrix and its covariance.

    Args:
        center: Subtract the mean token of each sequence.
        normalize: Scale each token to unit length.
        alpha: Order of the Rényi entropy; 1 is the von Neumann entropy of the paper.
        normalize_by: ``None``: nats. ``"log_d"``: divide by log d, as version 1 of the paper does. ``"log_rank"``:
            divide each sequence by the log of the rank that its tokens can attain.
        dtype: Of the statistics, float32 or float64, whatever the hidden states come in.
        num_features: d, if it is to be fixed before the first update; otherwise learnt from it.
        exclude_sinks: Leave out attention sinks, see :func:`~matent_callbacks.functional.sink_tokens`.
        **kwargs: For :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or d changes between updates.
        TypeError: If hidden states are not floating point.

    Shapes:
        ``update(hidden_states, attention_mask=None)``: ``(N, d)`` and ``(N,)``, or ``(B, T, d)`` and ``(B, T)``.
        ``compute()``: ``()``; NaN while no sequence has been seen. A sequence with fewer than two valid tokens (one,
        without centring) has no covariance and is left out.

    Example:
        >>> import torch
        >>> from matent_callbacks import SequenceMatrixEntropy
        >>> metric = SequenceMatrixEntropy()
        >>> metric.update(torch.stack([torch.eye(4), torch.ones(4, 4).tril()]))
        >>> round(metric.compute().item(), 4)
        1.0179
    """

    num_sequences: Tensor
    num_nonfinite: Tensor
    mean: Tensor
    _state_type = SequenceMean
    _counters = ("settings", "num_sequences", "num_nonfinite")

    def __init__(
        self,
        *,
        center: bool = True,
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
            center_sequences=center,
            normalize=normalize,
            alpha=alpha,
            dtype=dtype,
            num_features=num_features,
            exclude_sinks=exclude_sinks,
            settings=(hash(alpha), NORMALIZE_BY.index(normalize_by)),
            **kwargs,
        )
        self.center = center
        self.normalize_by = normalize_by
        self._seen_features = num_features
        self._add_states(empty_sequence_mean(dtype=dtype))

    def compute(self) -> Tensor:
        """Mean entropy of the sequences seen, ``()``, in nats or as ``normalize_by`` says."""
        return torch.where(self.num_sequences > 0, self.mean, torch.nan)

    def reset(self) -> None:
        """Forget everything seen, d included unless ``num_features`` fixes it."""
        super().reset()
        self._seen_features = self.num_features

    @property
    def _state_dtype(self) -> torch.dtype:
        return self.mean.dtype

    def _known_features(self) -> int | None:
        return self._seen_features

    def _accumulate(self, states: Tensor, mask: Tensor) -> None:
        self._seen_features = states.shape[-1]
        found = mean_entropy(
            states,
            mask,
            dtype=self._state_dtype,
            center=self.center,
            normalize=self.normalize,
            alpha=self.alpha,
            normalize_by=self.normalize_by,
        )
        self._join(found)

    def _join(self, other: SequenceMean) -> None:
        self._state = merge_sequence_means(self._state, other)

    def _all_reduce(self, group: Any) -> None:
        (self._state,) = all_reduce_sequence_means([self._state], group)


class SequenceEffectiveRank(SequenceMatrixEntropy):
    """Effective rank of a data set as Diff-eRank defines it, in dimensions: exp of the mean entropy of its sequences.

    exp(mean of H), not the mean of exp H (Wei et al., NeurIPS 2024). Shares its state with
    :class:`SequenceMatrixEntropy` in a ``torchmetrics.MetricCollection``.

    Args:
        center: Subtract the mean token of each sequence.
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
        ``compute()``: ``()``; NaN while no sequence has been seen.

    Example:
        >>> import torch
        >>> from matent_callbacks import SequenceEffectiveRank
        >>> metric = SequenceEffectiveRank()
        >>> metric.update(torch.eye(4))
        >>> round(metric.compute().item(), 4)
        3.0
    """

    def __init__(
        self,
        *,
        center: bool = True,
        normalize: bool = True,
        alpha: float = 1.0,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
        exclude_sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            center=center,
            normalize=normalize,
            alpha=alpha,
            dtype=dtype,
            num_features=num_features,
            exclude_sinks=exclude_sinks,
            **kwargs,
        )

    def compute(self) -> Tensor:
        """Effective rank of the sequences seen, ``()``, in dimensions."""
        return super().compute().exp()
