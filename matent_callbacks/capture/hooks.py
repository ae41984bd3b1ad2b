"""Reading hidden states and their mask out of a forward pass, with hooks that exist only while they are needed."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.adapters import AdapterState
from matent_callbacks.capture.calls import around_calls
from matent_callbacks.capture.compiled import call_eagerly, compiled_entrance, meet
from matent_callbacks.capture.forward import Forward, Seen
from matent_callbacks.capture.inference import preserved, sides
from matent_callbacks.capture.layers import Layers, ReadPoint
from matent_callbacks.capture.masks import Masks
from matent_callbacks.capture.packing import find_packing
from matent_callbacks.capture.values import first_tensor, named_arguments, sentence_embedding

# Names of a key-value cache: all models of transformers from 5.24 on; before, attention; Mamba and similar models.
_CACHES = ("cache", "past_key_values", "cache_params")

Reader = Callable[[str, Tensor | None, Tensor | None, Tensor | None], None]
Guard = Callable[[str], AbstractContextManager[None]]

# Held while a reader runs: the threads of nn.DataParallel update the same statistics.
_reading = threading.RLock()


class Capture:
    """Calls ``reader(key, hidden_states, attention_mask, vectors)`` for each read point of each forward that counts.

    Each call is made inside ``guard(key)``, which handles exceptions. ``hidden_states`` is None where the module's
    value contains no tensor. ``vectors`` ``(B, d)`` is one vector per sequence, where a module returns it along with
    its tokens. A forward that is given a key-value cache (generation) does not count. With ``training_only``, only
    forwards in training mode with gradients count; with ``same_adapters``, only those with the adapters that were
    active at :meth:`open`. Recomputation by gradient checkpointing never counts, nor does the inference of another
    reader. Compiled modules are re-executed eagerly, and read there. Without ``whole_sequences`` a packed batch is an
    error: part of a row does not show which document a token belongs to.
    """

    def __init__(
        self, model: nn.Module, layers: Layers, reader: Reader, guard: Guard, *, whole_sequences: bool = True
    ) -> None:
        self.seen = Seen()
        self._model = model
        self._layers = layers
        self._reader = reader
        self._guard = guard
        self._whole_sequences = whole_sequences
        self._undo: list[Callable[[], None]] = []
        self._training_only = False
        self._adapters: AdapterState | None = None
        self._outer_mask: Tensor | None = None
        self._sample_mask: Tensor | None = None
        self._beside = False
        self._sides = 0
        self._has_counted = False
        self._forwards: dict[int, Forward] = {}

    def open(
        self,
        *,
        training_only: bool = False,
        same_adapters: bool = False,
        attention_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
    ) -> None:
        """Start reading. ``attention_mask`` overrides the masks the model is given; ``sample_mask`` applies as well."""
        self.close()
        self._training_only = training_only
        self._outer_mask = attention_mask
        self._sample_mask = sample_mask
        self._sides = sides()
        with self._guard("all"):
            entrance = compiled_entrance(self._model, self._layers)
            if entrance is None:
                self._undo.extend(self._hooks())
            else:
                self._undo.append(meet(entrance, self._read_beside))
            # After the hooks: they replace `forward` methods, by which the state of the adapters is recognised.
            self._adapters = AdapterState(self._model) if same_adapters else None

    def close(self) -> None:
        """Remove the hooks and drop every reference to the forward."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._adapters = None
        self._outer_mask = self._sample_mask = None
        self._has_counted = False
        self._forwards.clear()

    @contextmanager
    def masked(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Let ``attention_mask`` override the masks that the model is given; None: they hold."""
        before, self._outer_mask = self._outer_mask, attention_mask
        try:
            yield
        finally:
            self._outer_mask = before

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Read with plain hooks, during forwards that are known to run eagerly."""
        undo: list[Callable[[], None]] = []
        before, self._sides = self._sides, sides()
        try:
            undo.extend(self._hooks())
            yield
        finally:
            for remove in undo:
                remove()
            self._sides = before
            self._forwards.clear()

    def _hooks(self) -> Iterator[Callable[[], None]]:
        """Register hook by hook, yielding how to remove each: if one fails, those before it can still be removed."""
        chain, inside, points = self._layers.chain, self._layers.inside, self._layers.points
        hooked = [module for module in chain if module not in self._layers.unhooked]
        for module in hooked:
            enter = functools.partial(self._enter, module)
            yield module.register_forward_pre_hook(enter, with_kwargs=True).remove
        for module in inside:
            if module in self._layers.unhooked:
                yield around_calls(module, self._call_inside, replicas=False)
            else:
                look = functools.partial(self._look_inside, module)
                yield module.register_forward_pre_hook(look, with_kwargs=True).remove
        for point in points:
            yield self._read_hook(point)
        for module in chain:
            yield around_calls(module, self._call, replicas=module in hooked)
        # Registered after the read points: a module in the chain must be read before its forward ends.
        for module in hooked:
            yield module.register_forward_hook(self._leave, always_call=True).remove

    def _read_hook(self, point: ReadPoint) -> Callable[[], None]:
        if point.module in self._layers.unhooked:
            return around_calls(point.module, functools.partial(self._call_point, point), replicas=False)
        if point.where == "input":
            before = functools.partial(self._read_input, point)
            return point.module.register_forward_pre_hook(before, with_kwargs=True).remove
        return point.module.register_forward_hook(functools.partial(self._read, point), with_kwargs=True).remove

    def _read_beside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._beside or not self._is_wanted(module):
            return
        self._beside = True
        try:
            with self._guard("all"), preserved(module), self.uncompiled():
                call_eagerly(module, args, kwargs)
        finally:
            self._beside = False

    # Hooks before and after a module in the chain that is called by `module(...)`. Under nn.DataParallel they also fire
    # on its replicas, so `module` may be a replica of `watched`.

    def _enter(self, watched: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        begins = self._forward is None
        forward = self._forwards.setdefault(threading.get_ident(), self._new_forward())
        forward.modules.append(watched)
        forward.is_met = True
        with self._guard("all"):
            forward.is_past_embeddings &= watched is not self._layers.owner
            if begins:
                forward.graph_task = torch._C._current_graph_task_id()
                forward.counts = (self._beside or self._is_wanted(module)) and not (
                    _in_backward() and self._has_counted
                )
            self.seen.ran.add(watched)
            arguments = named_arguments(module, args, kwargs)
            # A cache that the outermost module was not given was made inside, as by PEFT's prefix tuning.
            if begins and (_generates() or any(_holds_tokens(arguments.get(name)) for name in _CACHES)):
                forward.counts = False
            forward.masks.look(watched, arguments)
            if forward.packing is None and forward.counts:
                mask = arguments.get("attention_mask")
                is_flat = isinstance(mask, Tensor) and mask.ndim == 2
                forward.packing = find_packing(arguments, mask if is_flat else None)
                if forward.packing is not None and not self._whole_sequences:
                    raise ValueError(
                        "a batch is packed, so `context_group` does not tell whose tokens are one document."
                    )

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = None if torch.compiler.is_compiling() else self._forward
        if forward is None:
            return
        forward.modules.pop()
        if not forward.modules:
            del self._forwards[threading.get_ident()]

    # Wrappers around `forward`, which also see `module.forward(...)`.

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self._forward
        if current is not None and current.is_met and current.modules[-1] is module:
            current.is_met = False
            return forward(*args, **kwargs)
        try:
            self._enter(module, module, args, kwargs)
            self._forwards[threading.get_ident()].is_met = False
            points = [point for point in self._layers.points if point.module is module]
            for point in points:
                forward = functools.partial(self._call_point, point, module, forward)
            return forward(*args, **kwargs)
        finally:
            self._leave(module, args, None)

    def _call_inside(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._look_inside(module, module, args, kwargs)
        return forward(*args, **kwargs)

    def _call_point(
        self, point: ReadPoint, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if point.where == "input":
            self._read_input(point, module, args, kwargs)
            return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        self._read(point, module, args, kwargs, output)
        return output

    def _look_inside(
        self, watched: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling():
            return
        with self._guard("all"):
            self.seen.ran.add(watched)
            if self._forward is not None:
                self._forward.masks.look(watched, named_arguments(module, args, kwargs))

    def _read_input(self, point: ReadPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._forward
        if forward is None or not forward.is_past_embeddings:
            self._read(point, module, args, kwargs, args[0] if args else kwargs.get("hidden_states"))
        if forward is not None:
            forward.is_past_embeddings = True

    def _read(
        self, point: ReadPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return
        with self._guard(point.key), torch.no_grad():
            self.seen.called.add(point.key)
            if not self._is_read(module):
                return
            self.seen.counted = True
            self._has_counted |= not _in_backward()
            hidden_states = first_tensor(value)
            mask = None
            if hidden_states is not None:
                forward = self._forward or self._new_forward()
                arguments = functools.partial(named_arguments, module, args, kwargs)
                hidden_states, mask = forward.tokens(point, hidden_states, arguments, self.seen)
            with _reading:
                self._reader(point.key, hidden_states, mask, sentence_embedding(value))

    def _is_read(self, module: nn.Module) -> bool:
        forward = self._forward
        if forward is None:
            return not (_in_backward() or self._is_of_another()) and (
                self._beside or not self._training_only or module.training
            )
        return forward.counts and not _in_backward(since=forward.graph_task)

    def _is_of_another(self) -> bool:
        """Whether this forward is the inference of another reader, such as a second callback's probe."""
        return sides() > self._sides

    def _is_wanted(self, module: nn.Module) -> bool:
        if self._is_of_another():
            return False
        if self._adapters is not None and not self._adapters.unchanged():
            return False
        return not self._training_only or (module.training and torch.is_grad_enabled())

    def _new_forward(self) -> Forward:
        return Forward(Masks(self._model, self._outer_mask), self._sample_mask)

    @property
    def _forward(self) -> Forward | None:
        return self._forwards.get(threading.get_ident())


def _generates() -> bool:
    """Whether this thread is inside a module's ``generate``, which may do without a cache."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


def _holds_tokens(cache: Any) -> bool:
    """Whether an argument is a key-value cache with tokens in it, and not a flag or a cache that is still empty."""
    if isinstance(cache, bool | None):
        return False
    length = getattr(cache, "get_seq_length", None)
    return length is None or int(length()) > 0


def _in_backward(since: int = -1) -> bool:
    """Whether this thread is in another backward pass than the one with graph task ``since`` (-1: in any)."""
    # torch.utils.checkpoint itself tells recomputation from a forward this way.
    return torch._C._current_graph_task_id() != since
