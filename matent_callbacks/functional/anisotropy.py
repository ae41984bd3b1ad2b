"""How alike the directions of tokens are."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_cosine(mean: Tensor, count: Tensor) -> Tensor:
    r"""Mean cosine between two different tokens, over all pairs, from the mean of all unit vectors ``(d,)``.

    With N unit vectors, :math:`\sum_{i \neq j} u_i \cdot u_j = \lVert \sum_i u_i \rVert^2 - N`: this is anisotropy
    in the sense of Ethayarajh, "How contextual are contextualized word representations?", EMNLP 2019, where pairs are
    sampled.
    """
    number = count.to(mean.dtype)
    cosine: Tensor = (number * torch.linalg.vector_norm(mean).square() - 1) / (number - 1)
    return cosine
