"""Streams text through a model: windows of documents, batches of similar length, an entropy per sequence and layer."""

from __future__ import annotations

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
from matent_callbacks.capture.hooks import Capture
from matent_callbacks.capture.inference import quiet, run
from matent_callbacks.capture.layers import Layers
from matent_callbacks.cli._bootstrap import Floats, Means, draws
from matent_callbacks.cli._documents import Document, Text, TextError
from matent_callbacks.cli._models import ModelError, runnable
from matent_callbacks.cli._state import State
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
    max_length: int,
    batch_tokens: int,
    max_sequences: int | None = None,
    seed: int = 0,
    hold: Hold = nullcontext,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Run ``model`` over the rest of ``text`` and add the statistics to ``state``.

    Yields after each batch how many bytes of text are done. At these points ``state`` can be resumed from; while it
    cannot, ``hold`` is entered.

    With ``takes_vectors`` the output of a layer may be one vector per sequence instead of one hidden state per token.
    These vectors have no entropies of sequences.

    Several ranks share each window: they take batches in turn. All of them read and tokenize the whole text, so that
    they agree on the windows without communication, and each yields as many items as the others, some without a batch.

    Raises:
        TextError: If the text is not the one that ``state`` belongs to.
        ModelError: If a layer has no output that can be measured.
    """
    device = next(model.parameters()).device
    reader = _Reader(model, layers, sources, embedding, device, takes_vectors=takes_vectors)
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
    """Return how many more are allowed; ``None`` without a bound."""
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
    moments: dict[str, dict[Source, Moments]]
    others: dict[str, dict[Source, SequenceMean]]


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
    ) -> None:
        self.widths: dict[str, int] = {}
        self._target = runnable(model)
        self._layers = tuple(point.key for point in layers.points)
        self._sources = sources
        self._embedding = embedding
        self._takes_vectors = takes_vectors
        self._device = device
        self._capture = Capture(model, layers, self._record, lambda layer: nullcontext())
        self._shape = torch.Size()
        self._entropies: dict[str, Tensor] = {}
        self._moments: dict[str, dict[Source, Moments]] = {}
        self._others: dict[str, dict[Source, SequenceMean]] = {}

    def read(self, batch: Sequence[Tokenized], *, pad: int) -> _Found:
        """One forward."""
        length = len(batch[0].ids)
        ids = torch.tensor([sequence.ids + [pad] * (length - len(sequence.ids)) for sequence in batch])
        mask = torch.arange(length) < torch.tensor([[len(sequence.ids)] for sequence in batch])
        self._shape, self.widths, self._entropies, self._moments, self._others = ids.shape, {}, {}, {}, {}
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
        return _Found(entropies, self._moments, self._others)

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
        own = self._accumulator(self._sources | {"sequence"}, states)
        entropies = own.update(states, mask, vectors)
        assert entropies is not None  # no batch is empty
        self._entropies[layer] = torch.where(finite, entropies, torch.nan)
        self._keep(layer, states, own)

    def _record_vectors(self, layer: str, vectors: Tensor) -> None:
        if not self._takes_vectors:
            raise ModelError(
                f"--layers asks for {layer}, which gives one vector a document: --metrics must name a quantity of such "
                "vectors, like embedding_effective_rank."
            )
        own = self._accumulator(self._sources & OF_VECTORS, vectors)
        own.update(vectors, None)
        self._keep(layer, vectors, own)

    def _accumulator(self, sources: frozenset[Source], states: Tensor) -> LayerAccumulator:
        dtype = statistics_dtype(states)
        return LayerAccumulator(sources, max_tokens=None, dtype=dtype, device=self._device, embedding=self._embedding)

    def _keep(self, layer: str, states: Tensor, own: LayerAccumulator) -> None:
        self.widths[layer] = states.shape[-1]
        found = own.states()
        moments = {source: state.to(self._device) for source, state in found.items() if isinstance(state, Moments)}
        if moments:
            self._moments[layer] = moments
        others = {
            source: SequenceMean(*(tensor.cpu() for tensor in state))
            for source, state in found.items()
            if isinstance(state, SequenceMean) and source != "sequence"
        }
        if others:
            self._others[layer] = others


def _add(state: State, batch: Sequence[Tokenized], found: _Found, reader: _Reader, seed: int) -> None:
    counts = draws(seed, [sequence.document for sequence in batch])
    # The layers of one model are compared with each other, so all are measured on the same sequences.
    finite = np.all([np.ones(len(batch)), *(np.isfinite(values) for values in found.entropies.values())], axis=0)
    for layer, values in found.entropies.items():
        state.means.setdefault(layer, Means()).add(np.where(finite, values, np.nan), counts)
    for layer, moments in found.moments.items():
        state.add_moments(layer, moments)
    for layer, others in found.others.items():
        state.add_others(layer, others)
    for sequence, good in zip(batch, finite, strict=True):
        if good:
            state.sequences += 1
            state.tokens += len(sequence.ids)
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
