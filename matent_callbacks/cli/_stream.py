"""Streams a text through a model: windows of documents, batches of similar length, one entropy a sequence and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Source
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.moments import Moments, merge_moments
from matent_callbacks.capture.hooks import Capture
from matent_callbacks.capture.inference import quiet, run
from matent_callbacks.capture.layers import Layers
from matent_callbacks.cli._bootstrap import Floats, Means, draws
from matent_callbacks.cli._documents import Document, Text, TextError
from matent_callbacks.cli._models import ModelError, runnable
from matent_callbacks.functional._precision import statistics_dtype

# Documents that are sorted by length together.
_WINDOW = 512
Hold = Callable[[], AbstractContextManager[None]]


@dataclass
class State:
    """The statistics and the position of a pass over the text: all that is needed to resume it."""

    document: int = 0
    """The first one of the window at hand."""
    done: list[int] = field(default_factory=list)
    """Batches of this window that are done, by their place in it."""
    accepted: int = 0
    """Sequences before this window."""
    end: int = 0
    """Bytes before this window, and their checksum."""
    checksum: int = 0
    sequences: int = 0
    tokens: int = 0
    complete: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Where each kind of trouble was met first."""
    widths: dict[str, int] = field(default_factory=dict)
    means: dict[str, Means] = field(default_factory=dict)
    moments: dict[str, dict[Source, Moments]] = field(default_factory=dict)

    def skip(self, kind: str, place: str, count: int = 1) -> None:
        """Count documents that are left out, the first of them at ``place``."""
        self.skipped[kind] = self.skipped.get(kind, 0) + count
        self.places.setdefault(kind, place)

    def place(self) -> State:
        """The same place in the text, with nothing found."""
        kept = ("document", "accepted", "end", "checksum", "complete")
        return State(done=list(self.done), **{name: getattr(self, name) for name in kept})

    def clear(self) -> None:
        """Forget what was found, and go on from here."""
        vars(self).update(vars(self.place()))

    def add(self, other: State) -> None:
        """Add what another rank has found in other batches of the same windows."""
        self.done = sorted({*self.done, *other.done})
        self.sequences += other.sequences
        self.tokens += other.tokens
        for kind, count in other.skipped.items():
            self.skip(kind, other.places[kind], count)
        self.widths.update(other.widths)
        for layer, means in other.means.items():
            self.means.setdefault(layer, Means()).merge(means)
        for layer, moments in other.moments.items():
            self.add_moments(layer, moments)

    def add_moments(self, layer: str, moments: dict[Source, Moments]) -> None:
        """Add those of other tokens."""
        seen = self.moments.get(layer)
        if seen:
            moments = {
                source: merge_moments(seen[source], own.to(seen[source].scatter.device))
                for source, own in moments.items()
            }
        self.moments[layer] = moments

    def on(self, device: torch.device) -> State:
        """The same with the moments on a device."""
        moments = {
            layer: {source: own.to(device) for source, own in sources.items()}
            for layer, sources in self.moments.items()
        }
        return replace(self, moments=moments)


class Tokenized(NamedTuple):
    """One tokenized document."""

    document: int
    place: str
    ids: list[int]


class _Window(NamedTuple):
    batches: list[list[Tokenized]]
    skipped: list[tuple[str, str]]
    accepted: int
    documents: int
    last: Document


def stream(
    model: nn.Module,
    tokenizer: Any,
    text: Text,
    state: State,
    *,
    layers: Layers,
    sources: frozenset[Source] = frozenset(),
    max_length: int,
    batch_tokens: int,
    max_sequences: int | None = None,
    seed: int = 0,
    hold: Hold = nullcontext,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Run ``model`` over the rest of ``text`` and add the statistics to ``state``.

    Between two items of this iterator, which come after each batch and say how many bytes of text are done, the state
    is one to go on from. ``hold`` is entered while it is not.

    Several ranks share each window: in turn every rank takes a batch. All of them read and tokenize the whole text, so
    that they agree on the windows without a word, and each gives as many items as the others, some without a batch.

    Raises:
        TextError: If the text is not the one that the state is of.
        ModelError: If a layer gives nothing to measure.
    """
    device = next(model.parameters()).device
    reader = _Reader(model, layers, sources, device)
    state.moments = state.on(device).moments
    documents = enumerate(text.documents())
    _go_to(documents, state)
    with quiet(model):
        while not state.complete:
            window = _window(documents, tokenizer, max_length, batch_tokens, left(max_sequences, state.accepted))
            if window is None:
                break
            waiting = [index for index in range(len(window.batches)) if index not in state.done]
            for start in range(0, len(waiting), world_size):
                own = start + rank
                if own < len(waiting):
                    batch = window.batches[waiting[own]]
                    with hold():
                        _add(state, batch, reader.read(batch, pad=tokenizer.pad_token_id or 0), reader, seed)
                        state.done.append(waiting[own])
                left_over = max(len(waiting) - start - world_size, 0)
                done = 1 - left_over / len(window.batches)
                yield round(state.end + done * (window.last.end - state.end))
            with hold():
                _finish(state, window, counts=rank == 0)
                state.complete = left(max_sequences, state.accepted) == 0
    state.complete = True


def left(maximum: int | None, count: int) -> int | None:
    """How many more are allowed; ``None`` without a bound."""
    return None if maximum is None else max(maximum - count, 0)


def _go_to(documents: Iterator[tuple[int, Document]], state: State) -> None:
    if state.document == 0:
        return
    last = next(islice(documents, state.document - 1, state.document), None)
    if last is None or last[1].checksum != state.checksum:
        raise TextError("--text is not what it was when this measurement was interrupted: give another --out.")


def _window(
    documents: Iterator[tuple[int, Document]], tokenizer: Any, max_length: int, batch_tokens: int, most: int | None
) -> _Window | None:
    """The next documents as batches, the longest first, so that memory that does not suffice shows at once."""
    read = list(islice(documents, _WINDOW))
    if not read:
        return None
    texts = [document.text for _, document in read if document.trouble is None]
    ids = iter(tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else [])
    sequences: list[Tokenized] = []
    skipped = []
    used = 0
    for used, (index, document) in enumerate(read, 1):  # noqa: B007
        own = next(ids) if document.trouble is None else []
        if len(own) >= 2:
            sequences.append(Tokenized(index, document.place, own))
            if most is not None and len(sequences) == most:
                break
        else:
            skipped.append((document.trouble or "one_token", document.place))
    sequences.sort(key=lambda sequence: (-len(sequence.ids), sequence.document))
    batches: list[list[Tokenized]] = []
    for sequence in sequences:
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return _Window(batches, skipped, len(sequences), used, read[used - 1][1])


class _Found(NamedTuple):
    entropies: dict[str, Floats]
    """``(B,)`` by layer; NaN where a hidden state is not finite."""
    moments: dict[str, dict[Source, Moments]]


class _Reader:
    """Runs batches through a model and measures its layers."""

    def __init__(self, model: nn.Module, layers: Layers, sources: frozenset[Source], device: torch.device) -> None:
        self.widths: dict[str, int] = {}
        self._target = runnable(model)
        self._layers = tuple(point.key for point in layers.points)
        self._sources = sources
        self._device = device
        self._capture = Capture(model, layers, self._record, lambda layer: nullcontext())
        self._shape = torch.Size()
        self._entropies: dict[str, Tensor] = {}
        self._moments: dict[str, dict[Source, Moments]] = {}

    def read(self, batch: Sequence[Tokenized], *, pad: int) -> _Found:
        """One forward."""
        length = len(batch[0].ids)
        ids = torch.tensor([sequence.ids + [pad] * (length - len(sequence.ids)) for sequence in batch])
        mask = torch.arange(length) < torch.tensor([[len(sequence.ids)] for sequence in batch])
        self._shape, self._entropies, self._moments = ids.shape, {}, {}
        self._capture.open(attention_mask=mask)
        try:
            run(self._target, {"input_ids": ids, "attention_mask": mask.long()})
        finally:
            self._capture.close()
        if silent := [layer for layer in self._layers if layer not in self._entropies]:
            raise ModelError(f"--layers asks for {silent[0]}, which the model does not run through on text.")
        return _Found({layer: self._entropies[layer].double().cpu().numpy() for layer in self._layers}, self._moments)

    def _record(self, layer: str, states: Tensor | None, attention_mask: Tensor | None, vectors: Tensor | None) -> None:
        if states is not None and states.ndim == 2:  # experts and their like see one long row of tokens
            states = states.reshape(*self._shape, -1) if states.shape[0] == self._shape.numel() else states
        if states is None or states.shape[:-1] != self._shape or attention_mask is None:
            got = "no tensor" if states is None else f"a tensor {tuple(states.shape)}"
            raise ModelError(
                f"--layers asks for {layer}, which gives {got} for a batch of {tuple(self._shape)}: not one hidden "
                "state a token."
            )
        mask = attention_mask.reshape(self._shape).to(states.device) > 0
        finite = (torch.isfinite(states.sum(-1)) | ~mask).all(-1)
        self.widths[layer] = states.shape[-1]
        own = LayerAccumulator(
            self._sources | {"sequence"}, max_tokens=None, dtype=statistics_dtype(states), device=self._device
        )
        entropies = own.update(states, mask, vectors)
        assert entropies is not None  # no batch is empty
        self._entropies[layer] = torch.where(finite, entropies, torch.nan)
        if own.tokens:
            self._moments[layer] = {source: tokens.moments().to(self._device) for source, tokens in own.tokens.items()}


def _add(state: State, batch: Sequence[Tokenized], found: _Found, reader: _Reader, seed: int) -> None:
    counts = draws(seed, [sequence.document for sequence in batch])
    # The layers of one model are compared with each other: over the same sequences.
    finite = np.all([np.isfinite(values) for values in found.entropies.values()], axis=0)
    for layer, values in found.entropies.items():
        state.means.setdefault(layer, Means()).add(np.where(finite, values, np.nan), counts)
    for layer, moments in found.moments.items():
        state.add_moments(layer, moments)
    for sequence, good in zip(batch, finite, strict=True):
        if good:
            state.sequences += 1
            state.tokens += len(sequence.ids)
        else:
            state.skip("nonfinite", sequence.place)
    state.widths.update(reader.widths)


def _finish(state: State, window: _Window, *, counts: bool) -> None:
    """Go on to the next window. Every rank sees what this one leaves out; one of them counts it."""
    for kind, place in window.skipped if counts else ():
        state.skip(kind, place)
    state.document += window.documents
    state.accepted += window.accepted
    state.end, state.checksum = window.last.end, window.last.checksum
    state.done = []
