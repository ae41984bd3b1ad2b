"""The progress of one pass over a text, from which a later process or another rank can resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.moments import Moments, merge_moments
from matent_callbacks.accumulate.sequence_mean import SequenceMean, merge_sequence_means

REPLICATES = 1000

Floats = NDArray[np.float64]


def draws(seed: int, documents: Sequence[int]) -> Floats:
    """Draw how often each document counts: ``(documents, 1 + REPLICATES)``, the first column all ones.

    This is the Poisson bootstrap (Chamandy et al., "Estimating uncertainty for massive data streams", 2012). The draws
    of a document depend on the seed and its place in the text alone, so a resumed run equals an uninterrupted one, and
    the replicates of models measured on the same text are paired.
    """
    counts = np.ones((len(documents), 1 + REPLICATES))
    for row, document in zip(counts, documents, strict=True):
        row[1:] = np.random.Generator(np.random.Philox(key=[seed, document])).poisson(1.0, REPLICATES)
    return counts


def weighted_sums(values: Floats, counts: Floats) -> Floats:
    """Sum the values of sequences, and their weights, in each replicate: ``(2, 1 + REPLICATES)``.

    Args:
        values: ``(S,)``, NaN where there is none.
        counts: ``(S, 1 + REPLICATES)``, what :func:`draws` returned.
    """
    there = np.isfinite(values)
    return np.stack([values[there] @ counts[there], counts[there].sum(0)])


def group_of(seed: int, document: int, groups: int) -> int:
    """Draw the group whose moments a document belongs to; the same for all models measured on the same text."""
    return int(np.random.Generator(np.random.Philox(key=[seed, document])).integers(groups))


class Pooled(NamedTuple):
    """Statistics of layers from which only one number of all documents is computed, not one of each."""

    moments: dict[str, dict[Source, Moments]]
    means: dict[str, dict[Source, SequenceMean]]

    def add(self, other: Pooled) -> None:
        """Add those of other documents."""
        for layer, moments in other.moments.items():
            seen = self.moments.get(layer)
            if seen:
                moments = {
                    source: merge_moments(seen[source], own.to(seen[source].scatter.device))
                    for source, own in moments.items()
                }
            self.moments[layer] = moments
        for layer, means in other.means.items():
            before = self.means.get(layer)
            if before:
                means = {source: merge_sequence_means(before[source], own) for source, own in means.items()}
            self.means[layer] = means

    def on(self, device: torch.device) -> Pooled:
        """The same with the moments on a device."""
        moments = {layer: {s: own.to(device) for s, own in sources.items()} for layer, sources in self.moments.items()}
        return Pooled(moments, self.means)


@dataclass
class State:
    """The statistics and the position of a pass over the text: all that is needed to resume it."""

    document: int = 0
    """Number of the first document of the current window."""
    done: list[int] = field(default_factory=list)
    """Batches of this window that are done, by their index in it."""
    accepted: int = 0
    """Sequences before this window."""
    end: int = 0
    """Bytes before this window, and their checksum."""
    checksum: int = 0
    sequences: int = 0
    tokens: int = 0
    checksum_of_tokens: int = 0
    """The sum of the CRC-32 of each measured document's number and tokens: equal for models that saw the same."""
    complete: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Where each kind of trouble was first found."""
    widths: dict[str, int] = field(default_factory=dict)
    means: dict[str, Floats] = field(default_factory=dict)
    """The entropies of sequences by layer, as :func:`weighted_sums`; these are added up."""
    sinks: dict[str, list[float]] = field(default_factory=dict)
    """By layer with any: sinks left out, and the sum of the logarithms of how many times as long as others they are."""
    pooled: dict[int, Pooled] = field(default_factory=dict)
    """By the group of the documents; a single one, 0, unless models are compared with a baseline."""

    def skip(self, kind: str, place: str, count: int = 1) -> None:
        """Count documents that are left out, the first of them at ``place``."""
        self.skipped[kind] = self.skipped.get(kind, 0) + count
        self.places.setdefault(kind, place)

    def place(self) -> State:
        """Return the same place in the text, without statistics."""
        kept = ("document", "accepted", "end", "checksum", "complete")
        return State(done=list(self.done), **{name: getattr(self, name) for name in kept})

    def clear(self) -> None:
        """Discard the statistics, and keep the place in the text."""
        vars(self).update(vars(self.place()))

    def add(self, other: State) -> None:
        """Add what another rank has found in other batches of the same windows."""
        self.done = sorted({*self.done, *other.done})
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.checksum_of_tokens += other.checksum_of_tokens
        for kind, count in other.skipped.items():
            self.skip(kind, other.places[kind], count)
        self.widths.update(other.widths)
        for layer, sums in other.means.items():
            self.add_means(layer, sums)
        self.add_sinks(other.sinks)
        for group, pooled in other.pooled.items():
            self.add_pooled(group, pooled)

    def add_means(self, layer: str, sums: Floats) -> None:
        """Add the entropies of other sequences."""
        self.means[layer] = self.means.get(layer, 0) + sums

    def add_sinks(self, sinks: Mapping[str, Sequence[float]]) -> None:
        """Add the sinks of other sequences."""
        for layer, (number, logs) in sinks.items():
            if number:
                before = self.sinks.get(layer, (0, 0))
                self.sinks[layer] = [before[0] + number, before[1] + logs]

    def add_pooled(self, group: int, pooled: Pooled) -> None:
        """Add the statistics of other documents of a group."""
        self.pooled.setdefault(group, Pooled({}, {})).add(pooled)

    def on(self, device: torch.device) -> State:
        """The same with the moments on a device."""
        return replace(self, pooled={group: own.on(device) for group, own in self.pooled.items()})
