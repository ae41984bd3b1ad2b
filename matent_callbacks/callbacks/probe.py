"""The first examples of a data set as a probe, taken without moving anyone's random numbers on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch


def first_batch(dataset: Any, collate: Callable[[list[Any]], Any], count: int) -> Any:
    """The first ``count`` examples through a collator."""
    # A data set may draw: augmentation, or the seed of an iterator.
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
                examples = [dataset[i] for i in range(min(count, len(dataset)))]
            else:
                examples = list(itertools.islice(iter(dataset), count))
            return collate(examples)
    finally:
        random.setstate(state)
