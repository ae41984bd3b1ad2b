"""Estimates the entropy of a wide covariance without computing its eigenvalues."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from matent_callbacks.functional.spectrum import unit_trace

_NOTHING = 1e-6


def estimate_entropy(
    matrix: Tensor, *, size: int = 64, probes: int = 16, steps: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimate the entropy ``()`` of a symmetric ``(k, k)`` of any scale, in nats, and its standard error.

    The top ``size`` directions come from a randomised subspace (Halko, Martinsson & Tropp 2011), the rest from
    stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017) with ``probes`` probes as one block, scaled to the trace
    that remains, which is known. The standard error is that of the probes: it does not include the error of too few
    ``steps``. Random numbers come from a generator of its own, so that no other random state changes.
    """
    generator = torch.Generator(matrix.device).manual_seed(seed)
    covariance = unit_trace(matrix)
    basis = _top_subspace(covariance, size, generator)
    top = torch.linalg.eigvalsh(basis.T @ covariance @ basis).clamp(min=0)
    rest = (covariance.diagonal().sum() - top.sum()).clamp(min=0)
    left, error = _lanczos(covariance, basis, probes, steps, generator)
    # For a matrix of lower rank the rest is rounding error, and has no spectrum.
    left, error = (torch.where(rest > _NOTHING, value, 0.0) for value in (left, error))
    return torch.special.entr(top).sum() + rest * left, rest * error


def _top_subspace(covariance: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Find an orthonormal basis of the top directions, in two passes."""
    basis = _normal(covariance, size, generator)
    for _ in range(2 if size else 0):
        basis = torch.linalg.qr(covariance @ basis)[0]
    return basis


def _lanczos(
    covariance: Tensor, basis: Tensor, probes: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Estimate trace(-x log x) / trace(x) of the covariance outside ``basis``, and its standard error."""

    def outside(block: Tensor) -> Tensor:
        return block - basis @ (basis.T @ block)

    v = outside(_normal(covariance, probes, generator).sign())
    v = v / v.norm(dim=0)
    kept = v.unsqueeze(0)
    alphas, betas = [], []
    for _ in range(steps):
        w = outside(covariance @ kept[-1])
        alphas.append((w * kept[-1]).sum(0))
        # Orthogonal to all before: float32 loses orthogonality within a few steps.
        w = w - ((kept * w).sum(1, keepdim=True) * kept).sum(0)
        betas.append(w.norm(dim=0))
        kept = torch.cat([kept, (w / betas[-1].clamp(min=1e-30)).unsqueeze(0)])
    off = torch.stack(betas[:-1], -1)
    tridiagonal = torch.diag_embed(torch.stack(alphas, -1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal.to(torch.float32 if off.device.type == "mps" else torch.float64))
    weights, nodes = vectors[:, 0].square(), nodes.clamp(min=0)
    # The estimate of the trace has similar errors, so that the ratio has smaller ones; the trace itself is known.
    entropy, trace = (weights * torch.special.entr(nodes)).sum(-1), (weights * nodes).sum(-1)
    found = entropy.mean() / trace.mean()
    return found, (entropy - found * trace).std() / trace.mean() / math.sqrt(probes)


def _normal(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(len(like), columns, generator=generator, dtype=like.dtype, device=like.device)
