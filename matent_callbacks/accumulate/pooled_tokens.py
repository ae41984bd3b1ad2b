"""One set of tokens, those of a layer or a metric: kept as they are while they are few, as moments from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Center, Moments, add_to_scatter, empty_moments, merge_moments
from matent_callbacks.accumulate.symmetric import lower_triangle, symmetric
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import Tokens


class KeptTokens(NamedTuple):
    """Prepared tokens that are kept as they are."""

    values: Tensor
    """``(N, d)``; rows that do not count are zero."""
    valid: Tensor
    """``(N,)`` bool: the rows that count."""


class Matrix(NamedTuple):
    """A matrix whose non-zero eigenvalues are those of the covariance of the tokens, not divided by their number."""

    moments: Moments
    gram: Tensor | None = None
    """``(N, N)``, where the tokens are fewer than their features; of ``moments`` only the counts are used then."""
    add_mean: bool = False
    """Whether the tokens were not centred: their covariance is about the origin, ``moments`` are about the mean."""

    @property
    def num_features(self) -> int:
        """Number of features d; 0 if no token was seen."""
        return self.moments.num_features

    @property
    def size(self) -> int:
        """Number of rows k of the matrix: d, or the number of tokens."""
        if self.gram is not None:
            return self.gram.shape[0]
        return self.num_features if self.moments.has_scatter else 0

    def lower(self) -> Tensor:
        """``(k, k)``; only the lower triangle is that of the matrix. The caller may overwrite the result."""
        if self.gram is not None:
            return self.gram
        matrix, mean = lower_triangle(self.moments.scatter), self.moments.mean
        if not self.add_mean:
            return matrix
        # Added in float32, a large mean would wipe out the small eigenvalues. MPS has no float64.
        if mean.device.type != "mps":
            matrix, mean = matrix.double(), mean.double()
        return matrix.addr_(mean, mean * self.moments.num_tokens)

    def full(self) -> Tensor:
        """``(k, k)``, both triangles."""
        return symmetric(self.lower()) if self.gram is None else self.gram

    def to(self, device: torch.device) -> Matrix:
        """The same on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        return Matrix(self.moments.to(device), gram, self.add_mean)


class PooledTokens:
    """Accumulates tokens: keeps them as they are while they are few, and their moments from then on.

    Of N tokens the Gram matrix costs N^2 d to make and N^3 to decompose, the covariance N d^2 and d^3. So tokens are
    kept as long as there are not more than ``keep * d`` of them; that takes at most ``keep * d^2`` numbers.

    Args:
        center: What the covariance is about. For ``"sequence"`` tokens have to be centred before they come.
        moments: Of tokens that were accumulated before. Their counts are those of all tokens, the kept ones included.
            They are overwritten.
        kept: Tokens that were kept before.
        keep: Upper bound on the number of kept tokens, divided by d.
    """

    def __init__(self, center: Center, moments: Moments, kept: Sequence[KeptTokens] = (), *, keep: float = 1.0) -> None:
        self._center = center
        self._moments = moments
        self._kept = list(kept)
        self._keep = keep

    @property
    def num_features(self) -> int:
        """Number of features d; 0 as long as it is not known."""
        return self._moments.num_features

    def add(self, tokens: Tokens) -> None:
        """Add a batch ``(B, T, d)``, in full precision.

        Raises:
            ValueError: If d is not that of the tokens before. Everything accumulated so far is still there then.
        """
        new = KeptTokens(tokens.values.flatten(0, 1), tokens.valid.flatten())
        width = new.values.shape[1]
        if self.num_features not in (0, width):
            raise ValueError(f"it had {self.num_features} features before and has {width} now.")
        if not self.num_features:
            # The layers of a model may be on several devices: each accumulates where its tokens are.
            moments = self._moments.to(new.values.device)
            self._moments = moments._replace(scatter=moments.scatter.new_zeros(0, width + 1))
        if not self._moments.has_scatter and self._num_kept + len(new.values) <= self._keep * width:
            self._kept.append(new)
        else:
            self._fold_kept()
            self._add_to_scatter(new, self._moments.num_tokens)
        self._count(tokens.valid.sum(), tokens.valid.any(-1).sum(), tokens.nonfinite)

    def merge(self, other: PooledTokens) -> None:
        """Add all that ``other`` has accumulated; the tensors that it was made of stay as they are."""
        theirs = other._moments
        folded = self._moments.has_scatter or theirs.has_scatter
        width = self.num_features or theirs.num_features
        if folded or self._num_kept + other._num_kept > self._keep * width:
            self.add_moments(other.moments())
            return
        if not self.num_features:
            self._moments = empty_moments(width, dtype=theirs.scatter.dtype, device=theirs.scatter.device)
        self._kept += other._kept
        self._count(theirs.num_tokens, theirs.num_sequences, theirs.num_nonfinite)

    def add_moments(self, moments: Moments) -> None:
        """Add what :meth:`moments` of another gave."""
        self._fold_kept()
        self._moments = merge_moments(self._moments, moments)

    def moments(self) -> Moments:
        """Moments of all tokens; from here on none are kept."""
        self._fold_kept()
        return self._moments

    def parts(self) -> tuple[Moments, KeptTokens]:
        """What the constructor takes: moments whose counts are those of all tokens, and the kept ones as one tensor."""
        return self._moments, self._joined()

    def matrix(self) -> Matrix:
        """The Gram matrix of kept tokens, else the covariance."""
        if not self._kept:
            return Matrix(self._moments, add_mean=self._center is None)
        z, valid = self._joined()
        if self._center == "global":
            weight = valid.unsqueeze(-1).to(z.dtype)
            # Twice: the second time removes the rounding of a mean that dwarfs the spread.
            for _ in range(2):
                z = torch.addcmul(z, weight, z.sum(0) / self._moments.num_tokens.clamp(min=1), value=-1)
        if self._center is None and z.device.type != "mps":
            z = z.double()  # as in `Matrix.lower`
        with full_precision(z.device):
            return Matrix(self._moments, z @ z.T)

    @property
    def _num_kept(self) -> int:
        # By shape: how many of them count is known on the device only.
        return sum(len(tokens.values) for tokens in self._kept)

    def _joined(self) -> KeptTokens:
        if not self._kept:
            nothing = self._moments.scatter.new_zeros(0, self.num_features)
            return KeptTokens(nothing, nothing.new_zeros(0, dtype=torch.bool))
        if len(self._kept) == 1:
            return self._kept[0]
        values, valid = zip(*self._kept, strict=True)
        return KeptTokens(torch.cat(values), torch.cat(valid))

    def _fold_kept(self) -> None:
        # There is no scatter while tokens are kept.
        count = torch.zeros_like(self._moments.num_tokens)
        while self._kept:
            tokens = self._kept.pop()
            with full_precision(tokens.values.device):
                self._add_to_scatter(tokens, count)
            count = count + tokens.valid.sum()

    def _add_to_scatter(self, tokens: KeptTokens, count: Tensor) -> None:
        about_origin = self._center == "sequence"
        self._moments = add_to_scatter(self._moments, *tokens, count, about_origin=about_origin)

    def _count(self, num_tokens: Tensor, num_sequences: Tensor, num_nonfinite: Tensor) -> None:
        self._moments = self._moments._replace(
            num_tokens=self._moments.num_tokens + num_tokens,
            num_sequences=self._moments.num_sequences + num_sequences,
            num_nonfinite=self._moments.num_nonfinite + num_nonfinite,
        )
