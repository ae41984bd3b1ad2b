"""Streaming second moments of tokens, exact under any split: the state behind every pooled quantity."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from matent_callbacks.functional._tokens import Tokens

Center = Literal["sequence", "global"] | None


class Moments(NamedTuple):
    """What is kept of all tokens seen: O(d^2) numbers, however many they were."""

    num_tokens: Tensor
    """``()`` int64."""
    num_sequences: Tensor
    """``()`` int64: sequences with at least one of them."""
    num_nonfinite: Tensor
    """``()`` int64: tokens left out because of NaN or Inf."""
    mean: Tensor
    """``(d,)``."""
    scatter: Tensor
    """``(d, d)``: sum of outer products of the deviations from the mean."""


def empty_moments(num_features: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Moments:
    """The moments of no tokens; ``num_features=0`` while d is not known."""
    return Moments(
        num_tokens=torch.zeros((), dtype=torch.int64, device=device),
        num_sequences=torch.zeros((), dtype=torch.int64, device=device),
        num_nonfinite=torch.zeros((), dtype=torch.int64, device=device),
        mean=torch.zeros(num_features, dtype=dtype, device=device),
        scatter=torch.zeros(num_features, num_features, dtype=dtype, device=device),
    )


def token_moments(tokens: Tokens) -> Moments:
    """Moments of one batch of tokens, by the corrected two-pass algorithm (Chan, Golub & LeVeque 1983)."""
    z = tokens.values.flatten(0, 1)
    weight = tokens.valid.flatten().unsqueeze(-1).to(z.dtype)
    count = tokens.valid.sum()
    n = count.clamp(min=1).to(z.dtype)
    mean = z.sum(0) / n
    deviations = torch.addcmul(z, weight, mean, value=-1)
    # What rounding left of a mean that dwarfs the spread.
    residual = deviations.sum(0) / n
    scatter = (deviations.T @ deviations).addr_(residual, residual * -n)
    return Moments(count, tokens.valid.any(-1).sum(), tokens.nonfinite, mean + residual, scatter)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of tokens (Chan, Golub & LeVeque 1979, pairwise update)."""
    count = a.num_tokens + b.num_tokens
    n = count.clamp(min=1).to(a.mean.dtype)
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.num_tokens / n)
    scatter = (a.scatter + b.scatter).addr_(difference, difference * (a.num_tokens * (b.num_tokens / n)))
    # Where one side is empty its mean of zero must not count, not even by rounding.
    mean = torch.where(a.num_tokens == 0, b.mean, torch.where(b.num_tokens == 0, a.mean, mean))
    return Moments(count, a.num_sequences + b.num_sequences, a.num_nonfinite + b.num_nonfinite, mean, scatter)


def ratio(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """One count over another; whole numbers alone would be divided in the default dtype, which may be less."""
    return part.to(dtype) / whole.clamp(min=1).to(dtype)


def covariance(moments: Moments, *, center: Center) -> Tensor:
    """``(d, d)``, of any scale: about the common mean for ``"global"``, about the origin otherwise."""
    if center == "global":
        return moments.scatter
    # Tokens that were centred before they came have a small mean. A large one, added in float32, would wipe out the
    # small eigenvalues.
    exact = center is None and moments.mean.device.type != "mps"
    mean, scatter = (t.double() if exact else t for t in (moments.mean, moments.scatter))
    return scatter.addr(mean, mean * moments.num_tokens)


def attainable_rank(moments: Moments, *, center: Center) -> Tensor:
    """``()``: the largest rank that so many tokens can have; centring costs one, per sequence where it is done so."""
    lost = {None: torch.zeros_like(moments.num_tokens), "global": torch.ones_like(moments.num_tokens)}
    return (moments.num_tokens - lost.get(center, moments.num_sequences)).clamp(min=0, max=moments.mean.shape[0])
