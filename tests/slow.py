"""Quantities of sequences, and of one vector a sequence, by their definitions: one sequence after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tests.conftest import slow_entropy, slow_pooled_entropy

Batch = tuple[Tensor, Tensor]
"""Hidden states ``(B, T, d)`` and their mask."""


def slow_vectors(batches: Iterable[Batch], embedding: str) -> Tensor:
    found = []
    for states, mask in batches:
        for tokens, counts in zip(states.double(), mask.bool(), strict=True):
            own = [z for z, m in zip(tokens, counts, strict=True) if m]
            finite = [z for z in own if z.isfinite().all()]
            if embedding == "mean" and finite:
                found.append(sum(finite) / len(finite))
            elif own and embedding != "mean":
                found.append(own[0] if embedding == "first" else own[-1])
    return torch.stack([z for z in found if z.isfinite().all()])


def embedding_readings(vectors: Tensor) -> dict[str, float]:
    """Each quantity from the singular values of the matrix of all vectors."""
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    shares = torch.linalg.svdvals(directions - directions.mean(0)).square()
    shares = shares / shares.sum()
    entropy = -sum(x * math.log(x) for x in shares.tolist() if x > 1e-15)
    sigma = torch.linalg.svdvals(vectors)
    p = sigma / sigma.sum()
    above = [x for x in (sigma.square() / sigma.square().sum()).tolist() if x > vectors.shape[1] * 2.3e-16]
    x, y = [torch.tensor([math.log(v) for v in values]).double() for values in (range(1, len(above) + 1), above)]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return {
        "embedding_matrix_entropy": entropy,
        "embedding_effective_rank": math.exp(entropy),
        "embedding_participation_ratio": 1 / sum(x * x for x in shares.tolist()),
        "embedding_rankme": math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0)),
        "embedding_alpha_req": -slope.item(),
    }


def own_tokens(batches: Iterable[Batch]) -> list[Tensor]:
    """The tokens of each sequence of all batches that count."""
    rows = (states[mask].double() for b in batches for states, mask in zip(*b, strict=True))
    rows = (tokens[tokens.isfinite().all(1)] for tokens in rows)
    return [tokens for tokens in rows if len(tokens)]


def slow_curvature(tokens: Tensor) -> float:
    angles = []
    for one, two, three in zip(tokens, tokens[1:], tokens[2:], strict=False):
        before, after = two - one, three - two
        cosine = (before @ after / before.norm() / after.norm()).item()
        if not math.isnan(cosine):
            angles.append(math.acos(max(-1.0, min(1.0, cosine))))
    return sum(angles) / len(angles) if angles else math.nan


def sequence_readings(batches: Iterable[Batch]) -> dict[str, float]:
    """Of sequences whose tokens all differ from their mean."""
    sequences = own_tokens(batches)
    longest = max(map(len, sequences))
    several = [tokens for tokens in sequences if len(tokens) > 1]
    states = torch.stack([nn.functional.pad(tokens, (0, 0, 0, longest - len(tokens))) for tokens in several])
    mask = torch.stack([torch.arange(longest) < len(tokens) for tokens in several])
    total = sum(map(len, several))
    within = sum(len(z) / total * slow_entropy(z, torch.ones(len(z))) for z in several)
    angles = [value for value in map(slow_curvature, sequences) if not math.isnan(value)]
    return {
        "holevo_information": slow_pooled_entropy(states, mask) - within,
        "curvature": sum(angles) / len(angles),
    }


def slow_lidar(batches: Iterable[Batch], views: int = 8, delta: float = 1e-4) -> float:
    """Of the views of each document as a sample of one class, as the paper has it."""
    classes = []
    for tokens in own_tokens(batches):
        if len(tokens) >= views:
            parts = [[z for r, z in enumerate(tokens) if r * views // len(tokens) == v] for v in range(views)]
            classes.append(torch.stack([sum(part) / len(part) for part in parts]))
    z = torch.stack(classes)  # (n, q, d)
    n, q, d = z.shape
    means = z.mean(1)
    between = sum(torch.outer(m - means.mean(0), m - means.mean(0)) for m in means) / n
    within = sum(torch.outer(v - m, v - m) for own, m in zip(z, means, strict=True) for v in own) / (n * q)
    values, vectors = torch.linalg.eigh(within + delta * torch.eye(d, dtype=z.dtype))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ between @ root)
    p = eigenvalues.clamp(min=0) / eigenvalues.sum()
    return math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0))
