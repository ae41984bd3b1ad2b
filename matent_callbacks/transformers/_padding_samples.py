"""Finds the padding samples of an evaluation batch, which accelerate repeats."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size


def counted_samples(trainer: Trainer, batch: Any) -> Tensor | None:
    """``(B,)``: false for what accelerate repeats to complete the last batch on every rank; None: all count.

    In the concatenated batches of all ranks, the padding samples come last: samples from the beginning of the data set,
    which ``gather_for_metrics`` cuts off. They cannot be identified, and are not left out, in an iterable data set that
    is not dispatched, nor with a batch sampler without a ``batch_size``.
    """
    loader: Any = trainer.callback_handler.eval_dataloader
    if trainer.accelerator.num_processes == 1 or not getattr(loader, "end_of_dataloader", False):
        return None
    # With a batch sampler of the user's own, accelerate's is in the place of the sampler.
    places = (loader.batch_sampler, loader.sampler)
    shard: Any = next((place for place in places if hasattr(place, "even_batches")), None)
    if shard is None:
        # Under tensor parallelism all ranks have the same batches, without padding samples.
        if not isinstance(loader, DataLoaderDispatcher):
            return None
        rank, left = trainer.accelerator.process_index, loader.remainder
    elif not shard.even_batches or shard.drop_last or shard.batch_size is None:
        return None
    else:
        samples = getattr(shard.batch_sampler, "sampler", loader.dataset)
        rank, left = shard.process_index, len(samples) % loader.total_batch_size
    size = find_batch_size(batch)
    if left <= 0 or size is None:
        return None
    return torch.lt(torch.arange(rank * size, (rank + 1) * size), left)
