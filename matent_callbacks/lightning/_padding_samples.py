"""Finds the padding samples of an evaluation batch, which a ``DistributedSampler`` repeats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def counted_samples(trainer: Any, batch_idx: int, dataloader_idx: int) -> Tensor | None:
    """``(B,)``: false for the padding samples of the loader's ``DistributedSampler``; None: all count.

    The sampler deals out one sample to each rank in turn, then some from the beginning again, so that all have as many.
    Padding samples cannot be identified, and are not left out, without such a sampler or with batches of no fixed size.
    """
    combined = trainer._evaluation_loop._combined_loader
    loader = combined.flattened[dataloader_idx]
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if size is None or not isinstance(sampler, DistributedSampler) or combined._mode != "sequential":
        return None
    own = torch.arange(batch_idx * size, min((batch_idx + 1) * size, len(sampler)))
    data_set: Any = sampler.dataset
    return torch.lt(own * sampler.num_replicas + sampler.rank, len(data_set))
