"""Accumulates all tokens of a layer or of a metric: as they are while they are few, as moments from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import (
    Center,
    Moments,
    add_to_scatter,
    empty_moments,
    merge_moments,
    with_scatter,
)
from matent_callbacks.accumulate.pieces import Piece, rows_of_a_piece, slices
from matent_callbacks.accumulate.symmetric import blocks, diagonal, lower_triangle, symmetric
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import squares_are_lost
from matent_callbacks.functional.entropy import entropy_of_eigenvalues, entropy_of_matrix
from matent_callbacks.functional.spectrum import over_trace, solved

if TYPE_CHECKING:
    from matent_callbacks.accumulate.sequences import Sequences


class KeptTokens(NamedTuple):
    """Centred and normalised tokens that are kept as they are."""

    values: Tensor
    """``(N, d)``; rows that do not count are zero."""
    valid: Tensor
    """``(N,)`` bool: the rows that count."""


class Matrix(NamedTuple):
    """A matrix whose non-zero eigenvalues are those of the covariance of the tokens, not divided by their number."""

    moments: Moments
    gram: Tensor | None = None
    """``(N, N)``, if there are fewer tokens than features. Only the counts of ``moments`` are used then."""
    add_mean: bool = False
    """Whether the covariance is about the origin though ``moments`` are about the mean: for tokens without centring."""
    norms: Tensor | None = None
    """``(d,)``, beside a Gram matrix: the root of the sum of squares in each dimension."""
    as_correlation: bool = False
    """Whether each dimension is divided by its norm; a Gram matrix is of such tokens already."""

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
        """``(k, k)``: the matrix on and below the diagonal, arbitrary numbers above. The caller may overwrite it."""
        if self.gram is not None:
            return self.gram
        matrix, mean = lower_triangle(self.moments.scatter), self.moments.mean
        # Tokens that were centred before have no mean here.
        lost = squares_are_lost(mean.abs().amax(), matrix.dtype) if mean.numel() else None
        if lost is not None:  # unless they spread more widely than their mean is large
            info = torch.finfo(matrix.dtype)
            lost = lost & (matrix.diagonal().amax() < info.tiny / info.eps)
        if self.add_mean:
            # In float64: adding a large mean in float32 would wipe out the small eigenvalues. MPS has no float64.
            if mean.device.type != "mps":
                matrix, mean = matrix.double(), mean.double()
            matrix = matrix.addr_(mean, mean * self.moments.num_tokens)
        if lost is not None:
            matrix.diagonal().masked_fill_(lost, torch.nan)
        if self.as_correlation:
            scale = inverse_or_zero(matrix.diagonal().sqrt())
            matrix.mul_(scale).mul_(scale.unsqueeze(1))
        return matrix

    def top_dimension_share(self) -> Tensor:
        """``()``: the greatest diagonal element of the covariance over its trace, for tokens centred before."""
        norms = diagonal(self.moments.scatter).sqrt() if self.norms is None else self.norms
        largest = norms.amax()
        share: Tensor = (largest / torch.linalg.vector_norm(norms)).square()
        return share

    def blocks(self) -> tuple[Tensor, ...]:
        """The whole matrix for products: as one block ``(k, k)``, or as the three of ``[[A, B], [B.T, C]]``."""
        if self.gram is not None:
            return (self.gram,)
        if self.moments.mean.numel() or self.as_correlation:
            return (symmetric(self.lower()),)
        return blocks(self.moments.scatter)

    def to(self, device: torch.device) -> Matrix:
        """Copy to a device."""
        gram = None if self.gram is None else self.gram.to(device)
        norms = None if self.norms is None else self.norms.to(device)
        return Matrix(self.moments.to(device), gram, self.add_mean, norms, self.as_correlation)


def check_width(before: int, width: int) -> None:
    """Raise ``ValueError`` if tokens had another number of features before; 0: it is not known yet."""
    if before not in (0, width):
        raise ValueError(f"it had {before} features before and has {width} now.")


def inverse_or_zero(norms: Tensor) -> Tensor:
    """1 over each number, and 0 where that is 0."""
    return torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)


def entropy_of_lower(lower: Tensor, *, alpha: float) -> Tensor:
    """Entropy ``()`` of a matrix of any scale, whose lower triangle is in ``lower`` ``(k, k)``. Overwrites it."""
    if alpha == 2.0:  # without eigenvalues
        return entropy_of_matrix(symmetric(lower), alpha=2.0)
    return entropy_of_eigenvalues(over_trace(*solved(lower, overwrite=True)), alpha=alpha)


class PooledTokens:
    """Accumulates tokens: keeps them as they are while they are few, and their moments from then on.

    The Gram matrix of N tokens costs N^2 d to compute and N^3 to decompose, their covariance N d^2 and d^3. So tokens
    are kept as long as there are not more than ``keep * d`` of them; that takes at most ``keep * d^2`` numbers.

    Args:
        center: What is subtracted from the tokens.
        moments: What was accumulated before. The counts include kept tokens, mean and scatter do not. The scatter is
            overwritten by updates.
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
        """Number of features d; 0 until it is known."""
        return self._moments.num_features

    @property
    def dtype(self) -> torch.dtype:
        """That of the statistics."""
        return self._moments.scatter.dtype

    def update(self, sequences: Sequences, *, normalize: bool) -> None:
        """Add the tokens of some sequences. To be called with autocast and TF32 switched off.

        Raises:
            ValueError: If d is not that of the tokens before. Everything accumulated so far is still there then.
        """
        self.reserve(sequences.states)
        center = self._center == "sequence"
        moments = sequences.moments() if center and normalize else None
        if moments is not None:
            self.add_moments(moments)
            return
        for piece in sequences.pieces(center=center, normalize=normalize):
            self.add(piece)
            del piece

    def check_width(self, width: int) -> None:
        """Raise ``ValueError`` if tokens with another number of features were accumulated before."""
        check_width(self.num_features, width)

    def reserve(self, states: Tensor) -> None:
        """Decide whether the tokens of ``(B, T, d)`` will be kept, before :meth:`add` is given them piece by piece.

        Raises:
            ValueError: If d is not that of the tokens before. Everything accumulated so far is still there then.
        """
        width = states.shape[-1]
        self.check_width(width)
        if not self.num_features:
            # The layers of one model may be on several devices. Each accumulates on the device of its tokens.
            moments = self._moments.to(states.device)
            self._moments = moments._replace(scatter=moments.scatter.new_empty(0, width + 1))
        # By the number of rows, because counting the valid tokens would cost a device-to-host sync.
        if self._num_kept + states.shape[:-1].numel() > self._keep * width:
            self._fold_kept()
            self._moments = with_scatter(self._moments, width, about_origin=self._center == "sequence")

    def add(self, piece: Piece) -> None:
        """Add one piece of what was reserved."""
        device = self._moments.scatter.device
        values, valid, nonfinite = (tensor.to(device) for tensor in piece.tokens)
        # Detached from its base tensor, which would otherwise stay in memory as long as this view.
        new = KeptTokens(values.flatten(0, 1).detach(), valid.flatten().detach())
        if self._moments.has_scatter:
            self._add_to_scatter(new, self._moments.num_tokens)
        else:
            self._kept.append(new)
        self._count(valid.sum(), piece.num_sequences.to(device), nonfinite)

    def merge(self, other: PooledTokens) -> None:
        """Add everything that ``other`` has accumulated, without changing the tensors that it was created with."""
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
        """Add the moments of other tokens."""
        self._fold_kept()
        self._moments = merge_moments(self._moments, moments.to(self._moments.scatter.device))

    def moments(self) -> Moments:
        """Moments of all tokens. Kept tokens are turned into moments for this, and none are kept from then on."""
        self._fold_kept()
        return self._moments

    def parts(self) -> tuple[Moments, KeptTokens]:
        """Everything that was accumulated, as the constructor takes it, with the kept tokens in one tensor."""
        return self._moments, self._joined()

    def matrix(self, *, as_correlation: bool = False) -> Matrix:
        """The Gram matrix if tokens are kept, the covariance otherwise; or the correlations of dimensions."""
        if not self._kept:
            return Matrix(self._moments, add_mean=self._center is None, as_correlation=as_correlation)
        gram, norms = self._gram(as_correlation)
        return Matrix(self._moments, gram, norms=norms, as_correlation=as_correlation)

    @property
    def _num_kept(self) -> int:
        return sum(len(tokens.values) for tokens in self._kept)

    def _joined(self) -> KeptTokens:
        if not self._kept:
            nothing = self._moments.scatter.new_zeros(0, self.num_features)
            return KeptTokens(nothing, nothing.new_zeros(0, dtype=torch.bool))
        if len(self._kept) == 1:
            return self._kept[0]
        values, valid = zip(*self._kept, strict=True)
        return KeptTokens(torch.cat(values), torch.cat(valid))

    def _gram(self, as_correlation: bool) -> tuple[Tensor, Tensor]:
        """``(N, N)`` of the kept tokens, summed over a few features at a time, and the norms of these ``(d,)``."""
        dtype, device = self._moments.scatter.dtype, self._moments.scatter.device
        if self._center is None and device.type != "mps":
            dtype = torch.float64  # for the reason given in `Matrix.lower`
        weight = torch.cat([tokens.valid for tokens in self._kept]).unsqueeze(-1).to(dtype)
        count = self._moments.num_tokens.clamp(min=1)
        gram = torch.zeros(len(weight), len(weight), dtype=dtype, device=device)
        largest, norms = gram.new_zeros(()), gram.new_zeros(self.num_features)
        with full_precision(device):
            for columns in slices(self.num_features, rows_of_a_piece(len(weight), dtype)):
                z = torch.cat([tokens.values[:, columns].to(dtype) for tokens in self._kept])
                if self._center == "global":
                    largest = torch.maximum(largest, z.abs().amax())
                # Twice: if the mean is much larger than the spread, rounding leaves a part of it the first time.
                for _ in range(2 if self._center == "global" else 0):
                    z.addcmul_(weight, z.sum(0) / count, value=-1)
                norms[columns] = torch.linalg.vector_norm(z, dim=0)
                if as_correlation:
                    z *= inverse_or_zero(norms[columns])
                gram.addmm_(z, z.T)
                del z
        gram.diagonal().masked_fill_(squares_are_lost(largest, dtype), torch.nan)
        return gram, norms

    def _fold_kept(self) -> None:
        """Add the kept tokens to the scatter, which is empty as long as tokens are kept."""
        if not self._kept:
            return
        count = torch.zeros_like(self._moments.num_tokens)
        while self._kept:
            values, valid = self._kept.pop()
            with full_precision(values.device):
                for rows in slices(len(values), rows_of_a_piece(self.num_features, values.dtype)):
                    self._add_to_scatter(KeptTokens(values[rows], valid[rows]), count)
                    count = count + valid[rows].sum()

    def _add_to_scatter(self, tokens: KeptTokens, count: Tensor) -> None:
        about_origin = self._center == "sequence"
        self._moments = add_to_scatter(self._moments, *tokens, count, about_origin=about_origin)

    def _count(self, num_tokens: Tensor, num_sequences: Tensor, num_nonfinite: Tensor) -> None:
        self._moments = self._moments._replace(
            num_tokens=self._moments.num_tokens + num_tokens,
            num_sequences=self._moments.num_sequences + num_sequences,
            num_nonfinite=self._moments.num_nonfinite + num_nonfinite,
        )
