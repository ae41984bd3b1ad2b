"""Which samples of an evaluation batch are there for the first time."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size


def counted_samples(trainer: Trainer, batch: Any) -> Tensor | None:
    """``(B,)``: false for what accelerate repeats so that the last batch is whole on every rank; None: all count.

    The batches of all ranks, one behind the other, are whole but for their end, where samples from the beginning of
    the data set are put behind the last one: what ``gather_for_metrics`` cuts off. Nothing is known, and nothing left
    out, of an iterable data set that is not dispatched, nor of a batch sampler without a ``batch_size``.
    """
    loader: Any = trainer.callback_handler.eval_dataloader
    if trainer.accelerator.num_processes == 1 or not getattr(loader, "end_of_dataloader", False):
        return None
    # With a batch sampler of the user's own, accelerate's stands where the sampler would.
    places = (loader.batch_sampler, loader.sampler)
    shard: Any = next((place for place in places if hasattr(place, "even_batches")), None)
    if shard is None:
        # Under tensor parallelism all ranks have the same batches, and no sample more than there are.
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
