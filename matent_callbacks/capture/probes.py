"""Makes probes: named ones from a mapping, one from the first examples of a data set; and hashes their batches."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.capture.batches import check_probe
from matent_callbacks.capture.randomness import same_random_numbers


def prefix_of(name: str | None) -> str:
    """Return the prefix that a name puts before the names of values; ValueError for an invalid name."""
    if name is not None and (not isinstance(name, str) or not name or "/" in name):
        raise ValueError(f"`name` must be a text without '/', or None, got {name!r}.")
    return "" if name is None else f"{name}/"


def probes_by_prefix(probe: Any, prefix: str, *, check: bool = True) -> dict[str, Any]:
    """Return probes by the prefix of the names of their values; empty without a probe.

    Several probes are a mapping from names to probes, each a batch that is a mapping, or a list of batches.

    Raises:
        ValueError: If there is no probe, a name is invalid, or, with ``check``, what is passed is no batch: rows of a
            data set, the data set itself, text, or token ids in lists.
    """
    if probe is None:
        return {}
    if isinstance(probe, Mapping) and not probe:
        raise ValueError("`probe` must hold at least one batch or one named probe, got none.")
    # A rank may have no part in a list of batches.
    if isinstance(probe, list | tuple) and not probe and not _is_one_of_many():
        raise ValueError("`probe` must hold at least one batch, got none.")
    if not isinstance(probe, Mapping) or not all(map(_is_probe, probe.values())):
        if check:
            check_probe(probe)
        return {prefix: probe}
    for name, own in probe.items() if check else ():
        check_probe(own, name)
    return {f"{prefix}{prefix_of(name)}": own for name, own in probe.items()}


def _is_probe(value: Any) -> bool:
    batches = value if isinstance(value, list | tuple) else [value]
    return bool(batches) and all(isinstance(batch, Mapping) for batch in batches)


def _is_one_of_many() -> bool:
    """Whether this is a rank of a distributed run, or was launched to become one."""
    return (dist.is_available() and dist.is_initialized()) or int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_batch(dataset: Any, collate: Callable[[list[Any]], Any], count: int) -> Any:
    """Collate the first ``count`` examples of a data set."""
    # A data set may draw random numbers: for augmentation, or to seed an iterator.
    with same_random_numbers():
        return collate(_checked(list(itertools.islice(_items(dataset), count))))


def first_batches(dataset: Any, convert: Callable[[Any], Any], count: int, *, size: Callable[[Any], int]) -> list[Any]:
    """Return as many batches of a data set of batches as hold ``count`` examples by ``size``, or all of them."""
    batches: list[Any] = []
    with same_random_numbers():
        for item in _items(dataset):
            batches.append(convert(item))
            count -= size(batches[-1])
            if count <= 0:
                break
    return _checked(batches)


def _items(dataset: Any) -> Iterator[Any]:
    """Yield what is in a data set, from its beginning.

    Raises:
        ValueError: If it gives its examples only once, so that those taken here would be missing in training.
    """
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[i] for i in range(len(dataset)))
    items: Iterator[Any] = iter(dataset)
    if items is dataset or any(own is items for own in getattr(dataset, "__dict__", {}).values()):
        raise ValueError(f"`probe` must be given, since the data can be read only once: {type(dataset).__name__}.")
    return items


def _checked(items: list[Any]) -> list[Any]:
    if not items:
        raise ValueError("`probe` must be given, since there is no example in the data to take it from.")
    return items


def fingerprint(batch: Any) -> int:
    """Hash the contents of a batch to 64 bits, the same on every rank and in every run."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, batch)
    return int.from_bytes(digest.digest(), "little", signed=True)


def hashes(probe: Any) -> list[int]:
    """Return the :func:`fingerprint` of each batch of a probe."""
    return [fingerprint(batch) for batch in (probe if isinstance(probe, list | tuple) else [probe])]


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
