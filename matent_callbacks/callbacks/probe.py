"""Takes the first examples of a data set as a probe, without touching random states, and hashes probes."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


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


def fingerprint(batch: Any) -> int:
    """Hash the contents of a batch to 64 bits, the same on every rank and in every run."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, batch)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
