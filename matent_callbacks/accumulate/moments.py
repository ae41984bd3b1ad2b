"""Counts, mean and scatter matrix of tokens, which merge exactly over batches and ranks.

Everything pooled is computed from these moments: by the metric classes, the monitor and ``matent measure``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.symmetric import add_second_moment

Center = Literal["sequence", "global"] | None
"""What is subtracted from the tokens. ``"sequence"``: the mean of their sequence, before they are accumulated.
``"global"``: the mean of all tokens, which the moments take care of. ``None``: nothing."""


class Moments(NamedTuple):
    """Moments of a set of tokens: O(d^2) numbers, however many tokens there are.

    For tokens that were centred by their sequence, the scatter is about the origin, and no mean is kept. For all others
    it is about their mean: in float32, the difference of large sums about the origin would lose the small eigenvalues.
    """

    num_tokens: Tensor
    """``()`` int64."""
    num_sequences: Tensor
    """``()`` int64: sequences with at least one of these tokens."""
    num_nonfinite: Tensor
    """``()`` int64: tokens that were left out because of NaN or Inf."""
    mean: Tensor
    """``(d,)``; ``(0,)`` if the scatter is about the origin, or is not allocated yet."""
    scatter: Tensor
    """``(ceil(d / 2), d + 1)``: the sum of outer products of the tokens in packed form (see :mod:`.symmetric`);
    ``(0, d + 1)`` until it is allocated, with d = 0 until d is known."""

    @property
    def num_features(self) -> int:
        """Number of features d; 0 until it is known."""
        return self.scatter.shape[1] - 1

    @property
    def has_scatter(self) -> bool:
        """Whether the scatter is allocated, if only with zeros."""
        return self.scatter.shape[0] > 0

    def to(self, device: torch.device) -> Moments:
        """Copy to a device."""
        return self if self.scatter.device == device else Moments(*(tensor.to(device) for tensor in self))


def empty_moments(num_features: int = 0, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Moments:
    """The moments of no tokens."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    scatter = torch.zeros(0, num_features + 1, dtype=dtype, device=device)
    return Moments(zero, zero.clone(), zero.clone(), scatter.new_zeros(0), scatter)


def with_scatter(moments: Moments, num_features: int, *, about_origin: bool) -> Moments:
    """``moments`` with scatter and mean allocated as zeros, unless they are already."""
    if moments.has_scatter or not num_features:
        return moments
    return moments._replace(
        mean=moments.mean.new_zeros(0 if about_origin else num_features),
        scatter=moments.scatter.new_zeros((num_features + 1) // 2, num_features + 1),
    )


def add_to_scatter(moments: Moments, values: Tensor, valid: Tensor, count: Tensor, *, about_origin: bool) -> Moments:
    """Add tokens to mean and scatter, but not to the counts.

    Mean and scatter of the new tokens are computed by the corrected two-pass algorithm (Chan, Golub & LeVeque 1983) and
    merged with the old ones by the pairwise update (Chan, Golub & LeVeque 1979).

    Args:
        moments: What to add to. Its scatter is overwritten: only the returned moments may be used afterwards.
        values: ``(N, d)``; rows that do not count are zero.
        valid: ``(N,)`` bool: the rows that count.
        count: ``()`` int64: how many tokens are in ``moments.scatter`` already.
        about_origin: Whether the scatter is about the origin.
    """
    moments = with_scatter(moments, values.shape[1], about_origin=about_origin)
    if about_origin:
        add_second_moment(moments.scatter, values)
        return moments
    weight = valid.unsqueeze(-1).to(values.dtype)
    added = valid.sum()
    mean = values.sum(0) / added.clamp(min=1)
    # The pairwise update adds the outer product of one more row, which is put behind the others.
    deviations = values.new_empty(values.shape[0] + 1, values.shape[1])
    torch.addcmul(values, weight, mean, value=-1, out=deviations[:-1])
    # If the mean is much larger than the spread, rounding leaves a part of it: the second pass.
    residual = deviations[:-1].sum(0) / added.clamp(min=1)
    deviations[:-1].addcmul_(weight, residual, value=-1)
    mean += residual
    merged_mean, deviations[-1] = _pairwise(moments.mean, count, mean, added)
    add_second_moment(moments.scatter, deviations)
    return moments._replace(mean=merged_mean)


def merge_moments(moments: Moments, other: Moments) -> Moments:
    """Moments of the union of two sets of tokens, by the pairwise update of Chan, Golub & LeVeque (1979).

    The scatter of ``moments`` is overwritten, so only the returned moments may be used afterwards. ``other`` stays as
    it is.
    """
    num_tokens = moments.num_tokens + other.num_tokens
    num_sequences = moments.num_sequences + other.num_sequences
    num_nonfinite = moments.num_nonfinite + other.num_nonfinite
    mean, scatter = moments.mean, moments.scatter
    if other.has_scatter and not moments.has_scatter:
        mean, scatter = other.mean.clone(), other.scatter.clone()
    elif other.has_scatter:
        scatter.add_(other.scatter)
        if mean.numel():
            mean, row = _pairwise(mean, moments.num_tokens, other.mean, other.num_tokens)
            add_second_moment(scatter, row.unsqueeze(0))
    return Moments(num_tokens, num_sequences, num_nonfinite, mean, scatter)


def scatter_about(moments: Moments, mean: Tensor) -> Tensor:
    """A copy of the scatter, moved to another mean. A scatter about the origin stays about the origin."""
    scatter = moments.scatter.clone()
    if mean.numel():
        offset = moments.mean - mean
        add_second_moment(scatter, (offset * moments.num_tokens.to(offset.dtype).sqrt()).unsqueeze(0))
    return scatter


def ratio(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """One count divided by another in ``dtype``: two integers would be divided in torch's default dtype."""
    return part.to(dtype) / whole.clamp(min=1).to(dtype)


def attainable_rank(moments: Moments, *, center: Center) -> Tensor:
    """``()``: the largest rank that the covariance of that many tokens can have.

    Centring about one mean takes one from it, centring by sequence takes one for each sequence.
    """
    lost = {None: torch.zeros_like(moments.num_tokens), "global": torch.ones_like(moments.num_tokens)}
    rank = moments.num_tokens - lost.get(center, moments.num_sequences)
    return rank.clamp(min=0, max=moments.num_features)


def _pairwise(mean: Tensor, count: Tensor, other_mean: Tensor, other_count: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the union, and a row r: the scatter of the union is the sum of both scatters and of r r^T."""
    difference = other_mean - mean
    # Exactly 0 or 1 if one side is empty: the mean of the other side then stays as it is, without any rounding.
    share = ratio(other_count, count + other_count, mean.dtype)
    return mean + difference * share, difference * (count * share).sqrt()
