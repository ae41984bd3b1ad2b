"""Reads hidden states and their mask out of a forward pass, with hooks that exist only while they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from matent_callbacks.capture.blocks import ancestries
from matent_callbacks.capture.calls import around_calls
from matent_callbacks.capture.compiled import before_calls, call_eagerly, compiled_entrance, follows_compiled
from matent_callbacks.capture.events import Events, Wanted
from matent_callbacks.capture.forward import Seen
from matent_callbacks.capture.inference import inference_depth, preserved
from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.purpose import AdapterState


class Capture:
    """Calls ``reader(key, hidden_states, attention_mask, vectors)`` for each read point of each forward that counts.

    Each call is made inside ``guard(key)``, which handles exceptions. ``hidden_states`` is None where the module's
    value contains no tensor. ``vectors`` ``(B, d)`` is one vector per sequence, where a module returns it along with
    its tokens. Generation does not count: a forward inside a ``generate`` of the model, or one that is given a
    key-value cache with tokens, unless the model makes that cache itself, as prefix tuning does. Of several calls of a
    layer in one pass over the same tokens the last one counts. With ``training_only``, only forwards with gradients
    count; with ``same_adapters``, only those with the adapters that were active at :meth:`open`. Recomputation by
    gradient checkpointing never counts, nor does the inference of another reader. Compiled modules are re-executed
    eagerly, and read there. Without ``whole_sequences`` a packed batch is an error: part of a row does not show which
    document a token belongs to.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._undo: list[Callable[[], None]] = []

    @property
    def seen(self) -> Seen:
        """What ran since :meth:`forget_seen`."""
        return self._events.seen

    def forget_seen(self) -> None:
        """Begin a new record of what ran."""
        self._events.forget_seen()

    def open(
        self,
        *,
        training_only: bool = False,
        same_adapters: bool = False,
        attention_mask: Tensor | None = None,
        batch_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Start reading.

        ``attention_mask`` overrides the masks the model is given, ``batch_mask`` is used where it is given none, and
        ``sample_mask`` applies as well. ``labels`` are used where no module is given labels that fit.
        """
        self.close()
        wanted = self._events.wanted = Wanted(
            training_only=training_only,
            mask=attention_mask,
            batch_mask=batch_mask,
            samples=sample_mask,
            labels=labels,
            inference_depth=inference_depth(),
        )
        with self._events.guard("all"):
            entrance = compiled_entrance(self._events.model, self._events.layers)
            if entrance is None:
                self._undo.extend(self._hooks())
            else:
                self._undo.append(before_calls(entrance, self._read_eagerly))
                self._undo.extend(self._around(ancestries(self._events.model)[entrance][:-1]))
            # After the hooks: they replace `forward` methods, by which the state of the adapters is recognised.
            wanted.adapters = AdapterState(self._events.model) if same_adapters else None

    def close(self) -> None:
        """Remove the hooks and drop every reference to the forward."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._events.end()

    @contextmanager
    def masked(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Let ``attention_mask`` override the masks that the model is given; None: they hold. Its labels hold."""
        wanted = self._events.wanted
        before = wanted.mask, wanted.labels
        wanted.mask, wanted.labels = attention_mask, None
        try:
            yield
        finally:
            wanted.mask, wanted.labels = before

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Read with plain hooks, during forwards that are known to run eagerly."""
        undo: list[Callable[[], None]] = []
        wanted = self._events.wanted
        before, wanted.inference_depth = wanted.inference_depth, inference_depth()
        try:
            undo.extend(self._hooks())
            yield
        finally:
            for remove in undo:
                remove()
            wanted.inference_depth = before
            self._events.forget_forwards()

    def _hooks(self) -> Iterator[Callable[[], None]]:
        """Register hook by hook, yielding how to remove each: if one fails, those before it can still be removed."""
        layers = self._events.layers
        chain, inside, points = layers.chain, layers.inside, layers.points
        hooked = [module for module in chain if module not in layers.unhooked]
        yield from self._around(layers.around)
        for module in hooked:
            enter = functools.partial(self._events.enter, module)
            yield module.register_forward_pre_hook(enter, with_kwargs=True).remove
        for module in inside:
            if module in layers.unhooked:
                yield around_calls(module, self._events.call_inside, replicas=False)
            else:
                collect = functools.partial(self._events.collect_inside, module)
                yield module.register_forward_pre_hook(collect, with_kwargs=True).remove
        learning = self._events.attention
        if learning is not None:
            block, attention = learning
            yield block.register_forward_pre_hook(self._events.enter_block, with_kwargs=True).remove
        for point in points:
            if not self._events.runs_eagerly and follows_compiled(self._events.model, point):
                yield self._read_hook(replace(point, role="plain", others=()))
                continue
            for each in (point, *point.others):
                yield self._read_hook(each)
        if learning is not None:
            yield attention.register_forward_pre_hook(self._events.see_attention, with_kwargs=True).remove
        for module in chain:
            yield around_calls(module, self._events.call, replicas=module in hooked)
        # Registered after the read points: a module in the chain must be read before its forward ends.
        for module in hooked:
            yield module.register_forward_hook(self._events.leave, always_call=True).remove

    def _around(self, modules: Sequence[nn.Module]) -> Iterator[Callable[[], None]]:
        """Look for labels among the arguments of modules around what is hooked."""
        for module in modules if self._events.reads_labels else ():
            yield around_calls(module, self._events.call_around, replicas=False)

    def _read_hook(self, point: ReadPoint) -> Callable[[], None]:
        if point.module in self._events.layers.unhooked:
            return around_calls(point.module, functools.partial(self._events.call_point, point), replicas=False)
        if point.where == "input":
            before = functools.partial(self._events.read_input, point)
            return point.module.register_forward_pre_hook(before, with_kwargs=True).remove
        return point.module.register_forward_hook(functools.partial(self._events.read, point), with_kwargs=True).remove

    def _read_eagerly(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._events.runs_eagerly or not self._events.is_wanted():
            return
        self._events.runs_eagerly = True
        try:
            with self._events.guard("all"), preserved(module), self.uncompiled():
                call_eagerly(module, args, kwargs)
        finally:
            self._events.runs_eagerly = False
