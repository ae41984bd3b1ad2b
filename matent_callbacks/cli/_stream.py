"""Streams text through a model: windows of documents, batches of similar length, an entropy per sequence and layer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Source
from matent_callbacks.accumulate.layer_statistics import OF_VECTORS, LayerAccumulator
from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.capture.events import Events
from matent_callbacks.capture.hooks import Capture
from matent_callbacks.capture.inference import run, side_effect_free
from matent_callbacks.capture.layers import Layers
from matent_callbacks.cli._adapters import ModelError
from matent_callbacks.cli._documents import OTHER_TEXT, Document, Text, TextError
from matent_callbacks.cli._models import runnable
from matent_callbacks.cli._state import Floats, Pooled, State, draws, group_of, weighted_sums
from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import finite_rows

# Documents that are sorted by length together.
_WINDOW = 512
Hold = Callable[[], AbstractContextManager[None]]


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
    embedding: Embedding = "mean",
    takes_vectors: bool = False,
    exclude_sinks: bool = False,
    max_length: int,
    batch_tokens: int,
    max_sequences: int | None = None,
    seed: int = 0,
    groups: int = 1,
    hold: Hold = nullcontext,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Run ``model`` over the rest of ``text`` and add the statistics to ``state``.

    Yields after each batch how many bytes of text are done. At these points ``state`` can be resumed from; while it
    cannot, ``hold`` is entered.

    With ``takes_vectors`` the output of a layer may be one vector per sequence instead of one hidden state per token.
    These vectors have no entropies of sequences, and none of them is a sink.

    What is pooled over documents is kept apart for that many ``groups`` of them.

    Several ranks share each window: they take batches in turn. All of them read and tokenize the whole text, so that
    they agree on the windows without communication, and each yields as many items as the others, some without a batch.

    Raises:
        TextError: If the text is not the one that ``state`` belongs to.
        ModelError: If a layer has no output that can be measured.
    """
    device = next(model.parameters()).device
    reader = _Reader(
        model, layers, sources, embedding, device, takes_vectors=takes_vectors, exclude_sinks=exclude_sinks
    )
    state.pooled = state.on(device).pooled
    documents = enumerate(text.documents())
    _go_to(documents, state)
    with side_effect_free(model):
        while not state.complete:
            window = _window(documents, tokenizer, max_length, batch_tokens, left(max_sequences, state.accepted))
            if window is None:
                break
            waiting = [index for index in range(len(window.batches)) if index not in state.done]
            for start in range(0, len(waiting), world_size):
                own = start + rank
                if own < len(waiting):
                    batch = window.batches[waiting[own]]
                    numbers = [sequence.document for sequence in batch]
                    group_numbers = [group_of(seed, n, groups) if groups > 1 else 0 for n in numbers]
                    with hold():
                        found = reader.read(batch, group_numbers, pad=tokenizer.pad_token_id or 0)
                        _add(state, batch, found, reader, seed)
                        state.done.append(waiting[own])
                left_over = max(len(waiting) - start - world_size, 0)
                done = 1 - left_over / len(window.batches)
                yield round(state.end + done * (window.last.end - state.end))
            with hold():
                _finish(state, window, counts=rank == 0)
                state.complete = left(max_sequences, state.accepted) == 0
    state.complete = True


def left(maximum: int | None, count: int) -> int | None:
    """Return how many more are allowed; ``None`` without a bound."""
    return None if maximum is None else max(maximum - count, 0)


def _go_to(documents: Iterator[tuple[int, Document]], state: State) -> None:
    if state.document == 0:
        return
    last = next(islice(documents, state.document - 1, state.document), None)
    if last is None or last[1].checksum != state.checksum:
        raise TextError(OTHER_TEXT)


def _window(
    documents: Iterator[tuple[int, Document]], tokenizer: Any, max_length: int, batch_tokens: int, most: int | None
) -> _Window | None:
    """Return the next documents as batches, the longest first, so that a lack of memory shows at once."""
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
    pooled: dict[int, Pooled]
    """By group of documents."""
    sinks: dict[str, list[float]]
    """By layer, as those of :class:`.LayerAccumulator`."""


class _Reader:
    """Runs batches through a model and measures its layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        sources: frozenset[Source],
        embedding: Embedding,
        device: torch.device,
        *,
        takes_vectors: bool,
        exclude_sinks: bool,
    ) -> None:
        self.widths: dict[str, int] = {}
        self._target = runnable(model)
        self._layers = tuple(point.key for point in layers.points)
        self._sources = sources
        self._embedding = embedding
        self._takes_vectors = takes_vectors
        self._exclude_sinks = exclude_sinks
        self._device = device
        self._capture = Capture(Events(model, layers, self._record, lambda layer: nullcontext()))
        self._shape = torch.Size()
        self._entropies: dict[str, Tensor] = {}
        self._sinks: dict[str, Tensor] = {}
        self._rows: dict[int, list[int] | slice] = {}
        self._pooled: dict[int, Pooled] = {}

    def read(self, batch: Sequence[Tokenized], groups: Sequence[int], *, pad: int) -> _Found:
        """Run one forward over documents of these groups."""
        length = len(batch[0].ids)
        ids = torch.tensor([sequence.ids + [pad] * (length - len(sequence.ids)) for sequence in batch])
        mask = torch.arange(length) < torch.tensor([[len(sequence.ids)] for sequence in batch])
        self._shape, self.widths, self._entropies, self._sinks = ids.shape, {}, {}, {}
        several = sorted(set(groups))
        # A slice selects without a copy.
        self._rows = {g: [i for i, own in enumerate(groups) if own == g] for g in several}
        if len(several) == 1:
            self._rows = {several[0]: slice(None)}
        self._pooled = {group: Pooled({}, {}) for group in several}
        self._capture.open(attention_mask=mask)
        try:
            run((self._target,), {"input_ids": ids, "attention_mask": mask.long()})
        finally:
            self._capture.close()
        if silent := [layer for layer in self._layers if layer not in self.widths]:
            raise ModelError(f"--layers asks for {silent[0]}, which the model does not run through on text.")
        self.widths = {layer: self.widths[layer] for layer in self._layers}
        entropies = {
            layer: self._entropies[layer].double().cpu().numpy() for layer in self._layers if layer in self._entropies
        }
        return _Found(entropies, self._pooled, {layer: sinks.tolist() for layer, sinks in self._sinks.items()})

    def _record(self, layer: str, states: Tensor | None, attention_mask: Tensor | None, vectors: Tensor | None) -> None:
        if states is not None and states.ndim == 2:  # experts and their like see one long row of tokens
            states = states.reshape(*self._shape, -1) if states.shape[0] == self._shape.numel() else states
        if states is not None and states.shape[:-1] == self._shape[:1]:
            self._record_vectors(layer, states)
            return
        if states is None or states.shape[:-1] != self._shape or attention_mask is None:
            got = "no tensor" if states is None else f"a tensor {tuple(states.shape)}"
            raise ModelError(
                f"--layers asks for {layer}, which gives {got} for a batch of {tuple(self._shape)}: not one hidden "
                "state a token."
            )
        mask = attention_mask.reshape(self._shape).to(states.device) > 0
        finite = (finite_rows(states) | ~mask).all(-1)
        entropies = states.new_empty(len(states), dtype=statistics_dtype(states))
        for group, rows in self._rows.items():
            own = self._accumulator(self._sources | {"sequence"}, states)
            found = own.update(states[rows], mask[rows], None if vectors is None else vectors[rows])
            assert found is not None  # no batch is empty
            entropies[rows] = found
            self._sinks[layer] = self._sinks.get(layer, 0) + own.sinks
            self._keep(layer, states, own, group)
        self._entropies[layer] = torch.where(finite, entropies, torch.nan)

    def _record_vectors(self, layer: str, vectors: Tensor) -> None:
        if not self._takes_vectors:
            raise ModelError(
                f"--layers asks for {layer}, which gives one vector a document: --metrics must name a quantity of such "
                "vectors, like embedding_effective_rank."
            )
        for group, rows in self._rows.items():
            own = self._accumulator(self._sources & OF_VECTORS, vectors)
            own.update(vectors[rows], None)
            self._keep(layer, vectors, own, group)

    def _accumulator(self, sources: frozenset[Source], states: Tensor) -> LayerAccumulator:
        dtype = statistics_dtype(states)
        return LayerAccumulator(
            sources,
            max_tokens=None,
            dtype=dtype,
            device=self._device,
            embedding=self._embedding,
            exclude_sinks=self._exclude_sinks,
        )

    def _keep(self, layer: str, states: Tensor, own: LayerAccumulator, group: int) -> None:
        self.widths[layer] = states.shape[-1]
        kept, found = self._pooled[group], own.states()
        moments = {source: state.to(self._device) for source, state in found.items() if isinstance(state, Moments)}
        if moments:
            kept.moments[layer] = moments
        means = {
            source: SequenceMean(*(tensor.cpu() for tensor in state))
            for source, state in found.items()
            if isinstance(state, SequenceMean) and source != "sequence"
        }
        if means:
            kept.means[layer] = means


def _add(state: State, batch: Sequence[Tokenized], found: _Found, reader: _Reader, seed: int) -> None:
    counts = draws(seed, [sequence.document for sequence in batch])
    # The layers of one model are compared with each other, so all are measured on the same sequences.
    finite = np.all([np.ones(len(batch)), *(np.isfinite(values) for values in found.entropies.values())], axis=0)
    for layer, values in found.entropies.items():
        state.add_means(layer, weighted_sums(np.where(finite, values, np.nan), counts))
    state.add_sinks(found.sinks)
    for group, pooled in found.pooled.items():
        state.add_pooled(group, pooled)
    for sequence, good in zip(batch, finite, strict=True):
        if good:
            state.sequences += 1
            state.tokens += len(sequence.ids)
            state.checksum_of_tokens += zlib.crc32(f"{sequence.document}: {sequence.ids}".encode())
        else:
            state.skip("nonfinite", sequence.place)
    state.widths.update(reader.widths)


def _finish(state: State, window: _Window, *, counts: bool) -> None:
    """Go on to the next window. Every rank sees the documents left out of this one; one rank counts them."""
    for kind, place in window.skipped if counts else ():
        state.skip(kind, place)
    state.document += window.documents
    state.accepted += window.accepted
    state.end, state.checksum = window.last.end, window.last.checksum
    state.done = []
