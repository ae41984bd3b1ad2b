"""Estimates the quantities of a wide covariance from matrix products, without its eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
"""Number of probes, which are multiplied together."""
STEPS = 6
"""Number of products of the matrix with a block."""

# The strongest directions are taken as found up to the first whose residual is more than this share of its eigenvalue.
_FOUND = 0.01
# What rounding does to sums of eigenvalues and of their squares, and to the entropy, in units of the last place.
_ROUNDING, _ROUNDING_OF_ENTROPY = 8, 400
# Of the correction for too few steps: by how much it is larger than that of a geometric series, since convergence slows
# down, and which share of it is its standard error.
_SLOWER, _UNSURE = 1.25, 0.25


class Projection(NamedTuple):
    """A covariance of unit trace in the space that its products with a block of probes span."""

    inside: Tensor
    """``(n, n)``: the covariance in an orthonormal basis of that space, whose first vectors span the probes."""
    start: Tensor
    """``(b, b)``: the probes in that basis."""
    left: Tensor
    """``(b, b)``: the Gram matrix of what the last product has outside of the space."""
    squares: Tensor
    """``()``: the sum of the squared eigenvalues."""


class Krylov(NamedTuple):
    """The space that the products of a matrix ``(k, k)`` with a block of probes span."""

    basis: Tensor
    """``(k, n)``, orthonormal; the first vectors span the probes."""
    inside: Tensor
    """``(n, n)``: the matrix in that basis."""
    outside: Tensor
    """``(k, b)``: what the last product has outside of the space."""


class Estimate(NamedTuple):
    """What is known of several covariances of unit trace."""

    entropy: Tensor
    """``(m,)``, nats."""
    error: Tensor
    """``(m,)``: the standard error of the entropy: of the probes, of too few steps, and of rounding."""
    squares: Tensor
    """``(m,)``: the sum of the squared eigenvalues, which is not estimated."""
    top: Tensor
    """``(m, b)``: the largest eigenvalues in descending order."""


def project(blocks: Sequence[Tensor], *, block: int = BLOCK, steps: int = STEPS, seed: int = 0) -> Projection:
    """Project a symmetric matrix of any scale on the block Krylov space of ``block`` random probes.

    The matrix is given as one block ``(k, k)``, or as the three of ``[[A, B], [B.T, C]]``.
    """
    first, last = blocks[0], blocks[-1]
    squares = [torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in blocks]
    total, trace = squares[0], first.diagonal().sum(dtype=torch.float64)
    if len(blocks) > 1:
        total, trace = total + 2 * squares[1] + squares[2], trace + last.diagonal().sum(dtype=torch.float64)
    scale = torch.where(trace > 0, 1 / trace, 1.0)

    def multiply(vectors: Tensor) -> Tensor:
        if len(blocks) == 1:
            return (first @ vectors).mul_(scale)
        upper, lower = vectors[: len(first)], vectors[len(first) :]
        product = torch.cat([(first @ upper).addmm_(blocks[1], lower), (last @ lower).addmm_(blocks[1].T, upper)])
        return product.mul_(scale)

    size = len(first) if len(blocks) == 1 else len(first) + len(last)
    return krylov(multiply, normal(size, block, seed, first), total * scale.square(), steps)


def krylov(multiply: Callable[[Tensor], Tensor], probes: Tensor, squares: Tensor, steps: int) -> Projection:
    """Multiply ``probes`` ``(k, b)``, from a normal distribution, ``steps`` times by a matrix of unit trace."""
    # Of one length: the number of eigenvalues is known, and is no longer a source of variance.
    probes = probes / torch.linalg.vector_norm(probes, dim=0)
    found = spanned(multiply, probes, steps)
    start = found.basis[:, : probes.shape[1]].T @ probes
    return Projection(found.inside, start, found.outside.T @ found.outside, squares)


def spanned(multiply: Callable[[Tensor], Tensor], probes: Tensor, steps: int) -> Krylov:
    """Span a space by ``steps`` products of a symmetric matrix of any scale with ``probes`` ``(k, b)``."""
    block = probes.shape[1]
    basis = _orthonormal(probes)
    columns = []
    for step in range(steps):
        product = multiply(basis[:, step * block :])
        inside = basis.T @ product
        columns.append(torch.nn.functional.pad(inside, (0, 0, 0, (steps - 1 - step) * block)))
        outside = product - basis @ inside
        if step < steps - 1:
            # A matrix of low rank leaves nothing but rounding errors outside. Random vectors are as good, if they are
            # of that size, and they are independent. Orthogonal to all before: float32 is not, the first time, and such
            # errors all point to the strongest direction, so they are taken out before they are scaled up.
            outside = outside - basis @ (basis.T @ outside)
            noise = probes.roll(step + 1, 0) * torch.linalg.vector_norm(product)
            new = _orthonormal(outside + torch.finfo(probes.dtype).eps * noise)
            new = _orthonormal(new - basis @ (basis.T @ new))
            basis = torch.cat([basis, new], 1)
    upper = torch.cat(columns, 1).triu()
    return Krylov(basis, upper + upper.triu(1).T, outside)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis ``(k, b)`` of the columns of ``vectors``, by Cholesky QR: two matrix products."""
    gram = vectors.double()
    gram = gram.T @ gram
    triangle = torch.linalg.cholesky_ex(gram)[0]  # unlike `cholesky`, it does not wait for a GPU
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=False).to(vectors.dtype)
    return torch.mm(vectors, inverse.T)


def normal(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Numbers ``(rows, columns)`` from a normal distribution, the same on every device, without any random state."""
    mixed = torch.arange(rows * columns, device=like.device) + seed * 0x9E3779B9
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finalizer of MurmurHash3, in 32 bits
        mixed.bitwise_and_(0xFFFFFFFF)
        mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    uniform = (mixed.bitwise_and_(0xFFFFFFFF) >> 8).to(like.dtype) + 0.5
    return torch.erfinv(uniform / 2**23 - 1).mul_(math.sqrt(2)).view(rows, columns)


def estimates(projections: Sequence[Projection], num_eigenvalues: int) -> Estimate:
    """Estimate the entropy, by block Lanczos quadrature with control variates, and the largest eigenvalues.

    The probes give the quadrature of f(x) = -x log x over the eigenvalues (Ubaru, Chen & Saad 2017; all of them in one
    block: Golub & Meurant 2010). Three things make it exact to a few hundredths of a percent:

    - The strongest directions, which the same products find (Musco & Musco 2015), are taken out of it (as in Hutch++,
      Meyer et al. 2021), and count with the entropy of their eigenvalues.
    - Of the others the number, the sum and the sum of squares are known. So only what f differs from a polynomial of
      degree 2 is estimated, that which leaves the least variance.
    - The error of too few steps falls like a geometric series, so that the last steps tell what is left of it.
    """
    inside, start, left, squares = (torch.stack(found) for found in zip(*projections, strict=True))
    size, block = inside.shape[-1], start.shape[-1]
    # Not a number, or overflowed: the solver would raise. The result is not finite, since `squares` are not.
    usable = torch.isfinite(inside).all((-2, -1), keepdim=True)
    inside, start, left = (torch.where(usable, found, 0.0) for found in (inside, start, left))
    # In float64: an error of the largest eigenvalue may exceed all that is left of a layer with an outlier.
    inside = inside.double()
    values, vectors = torch.linalg.eigh(inside)
    values = values.clamp(min=0)
    # What each probe and eigenvalue contribute to a sum over all eigenvalues: ``(m, n, b)``.
    weights = num_eigenvalues * (vectors[:, :block].mT @ start.double()).square()
    quadratures = [(torch.special.entr(values) * weights.mean(-1)).sum(-1)]
    for kept in (size - block, size - 2 * block):  # with one and two steps less
        shorter, own = torch.linalg.eigh(inside[:, :kept, :kept])
        share = num_eigenvalues * (own[:, :block].mT @ start.double()).square().mean(-1)
        quadratures.append((torch.special.entr(shorter.clamp(min=0)) * share).sum(-1))
    correction = _of_too_few_steps(*quadratures)
    found = _found(values, vectors[:, -block:], left.double(), weights.mean(-1))
    weights = weights * ~found.unsqueeze(-1)
    scale = torch.where(found, 0.0, values).amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    powers = torch.stack([torch.ones_like(values), values / scale, (values / scale).square()], -1)
    total = torch.stack([torch.full_like(squares, num_eigenvalues), (squares > 0).double(), squares], -1)
    strongest = torch.where(found, values, 0.0)
    known = total - torch.stack([found.double(), strongest, strongest.square()], -1).sum(-2)
    units = torch.cat([torch.ones_like(scale), scale, scale.square()], -1)
    unit = torch.finfo(start.dtype).eps
    rounding = _ROUNDING * unit * torch.stack([0 * squares, squares.sign(), squares], -1)
    known, rounding = known.clamp(min=0) / units, rounding / units
    entropy = torch.special.entr(values)
    coefficients = _least_variance(powers, entropy, 2 / block * weights.mean(-1), rounding.square())
    difference = entropy - (powers @ coefficients.unsqueeze(-1)).squeeze(-1)
    of_probes = (weights * difference.unsqueeze(-1)).sum(-2)
    estimate = torch.special.entr(strongest).sum(-1) + (coefficients * known).sum(-1) + of_probes.mean(-1) - correction
    variance = of_probes.var(-1) / block + (coefficients * rounding).square().sum(-1) + (_UNSURE * correction).square()
    variance = variance + (_ROUNDING_OF_ENTROPY * unit) ** 2
    top = values.flip(-1)[:, :block]
    return Estimate(estimate.clamp(0.0, math.log(num_eigenvalues)), variance.sqrt(), squares, top)


def _of_too_few_steps(full: Tensor, one_less: Tensor, two_less: Tensor) -> Tensor:
    """By how much a quadrature exceeds the integral, from those with one and two steps less."""
    change = (one_less - full).clamp(min=0)
    ratio = (change / (two_less - one_less).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0.0, 0.75)
    return _SLOWER * change * ratio / (1 - ratio)


def _found(values: Tensor, last: Tensor, left: Tensor, weight: Tensor) -> Tensor:
    """``(m, n)`` bool: the strongest directions, as far as each is an eigenvector, and stands for itself only."""
    block = left.shape[-1]
    residual = (left @ last * last).sum(-2).clamp(min=0).sqrt().flip(-1)
    # Of more equal eigenvalues than probes, only as many directions are found, and each takes the share of several.
    sums = torch.nn.functional.pad(weight.flip(-1).cumsum(-1), (1, 0))
    several = (sums[:, block:] - sums[:, :-block]) / block > 1 + 5 * math.sqrt(2) / block
    several = torch.nn.functional.pad(several.double(), (block - 1, block - 1))
    alone = torch.nn.functional.max_pool1d(several, block, 1) == 0
    return ((residual < _FOUND * values.flip(-1)) & alone).long().cumprod(-1).flip(-1).bool()


def _least_variance(powers: Tensor, function: Tensor, weight: Tensor, rounding: Tensor) -> Tensor:
    """``(m, 3)``: the polynomial with the least variance of what it leaves, and of what rounding does to its sum."""
    weighted = powers * weight.unsqueeze(-1)
    matrix = weighted.mT @ powers + torch.diag_embed(rounding)
    # Where the eigenvalues are few, several polynomials are equally good.
    ridge = 1e-13 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float32).tiny
    matrix = matrix + torch.diag_embed(ridge.unsqueeze(-1).expand(-1, 3))
    solution: Tensor = torch.linalg.solve_ex(matrix, weighted.mT @ function.unsqueeze(-1))[0]
    return solution.squeeze(-1)
