"""Keeps the probes that are the first pairs of data sets, where the user gave none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from matent_callbacks.capture.influence import Influence
from matent_callbacks.capture.probes import first_batch, first_batches

# Loaders that are made anew for each evaluation may have a data set of their own each.
_KEPT = 16


class Examples(NamedTuple):
    """The part of a data loader that first pairs are taken by."""

    dataset: Any
    collate_fn: Callable[[Any], Any]


@dataclass
class Probe:
    """Batches of pairs, and whether training changes what is read of them."""

    batches: Any
    influence: Influence = field(default_factory=Influence)


class _Found(NamedTuple):
    mark: str | int
    reference: Callable[[], Any]
    probe: Probe


class FirstPairs:
    """One probe for each data set, by its identity; training stays on the one that was found first."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._of_training: Probe | None = None
        self._found: list[_Found] = []

    def of_training(self, loader: Callable[[], Any]) -> Probe:
        """Return the probe of the loader that the first call gave."""
        if self._of_training is None:
            self._of_training = self.of(loader())
        return self._of_training

    def of(self, loader: Any) -> Probe:
        """Return the probe of the data that a loader gives.

        Raises:
            ValueError: If it is not known what these data are.
        """
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if dataset is None or collate is None:
            raise ValueError(
                "`probe` must be given, since no pairs can be taken from the data: their loader must have `dataset` "
                f"and `collate_fn`, as a DataLoader has, got {type(loader).__name__}."
            )
        mark = _mark(dataset)
        # A data set that is gone has left its place in memory, and so its mark, to others.
        self._found = [own for own in self._found[-_KEPT:] if own.reference() is not None]
        for own in self._found:
            if own.mark == mark:
                return own.probe
        gives_batches = getattr(loader, "batch_size", self) is None and getattr(loader, "batch_sampler", None) is None
        read = _enough_batches if gives_batches else first_batch
        probe = Probe(read(dataset, collate, self._count))
        self._found.append(_Found(mark, _reference(dataset), probe))
        return probe


def _enough_batches(dataset: Any, convert: Callable[[Any], Any], count: int) -> list[Any]:
    return first_batches(dataset, convert, count, size=_num_pairs)


def _num_pairs(batch: Any) -> int:
    """Return how many pairs are in a batch that the data set itself made."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            "`probe` must be given, since no pairs can be taken from the data: a loader with `batch_size=None` must "
            f"give batches with `input_ids` (B, T), got {'none' if ids is None else type(batch).__name__}."
        )
    return len(ids)


def _mark(dataset: Any) -> str | int:
    """Return what is the same for the same data: that of the object, or the fingerprint of a Hugging Face data set."""
    # Their Trainer makes a new one, without the columns that are not used, for each evaluation.
    mark = getattr(dataset, "_fingerprint", None)
    return mark if isinstance(mark, str) else id(dataset)


def _reference(dataset: Any) -> Callable[[], Any]:
    """Refer to a data set, without keeping it in memory where that is possible; True stands for one by fingerprint."""
    if isinstance(_mark(dataset), str):
        return lambda: True
    try:
        return weakref.ref(dataset)
    except TypeError:
        return lambda: dataset


def leaves(loaders: Any) -> list[Any]:
    """Return the loaders in lists, mappings and Lightning's ``CombinedLoader``, in its order."""
    if loaders is None:
        return []
    flattened = getattr(loaders, "flattened", None)
    if flattened is not None:
        return leaves(flattened)
    parts: Iterable[Any] | None = None
    if isinstance(loaders, Mapping):
        parts = loaders.values()
    elif isinstance(loaders, list | tuple):
        parts = loaders
    return [loaders] if parts is None else [leaf for part in parts for leaf in leaves(part)]
