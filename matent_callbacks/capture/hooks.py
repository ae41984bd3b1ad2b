"""Reading hidden states and their mask out of a forward pass, with hooks that exist only while they are needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from matent_callbacks.capture.adapters import AdapterState
from matent_callbacks.capture.compiled import call_eagerly, compiled_entrance, meet
from matent_callbacks.capture.inference import preserved
from matent_callbacks.capture.layers import Layers, ReadPoint
from matent_callbacks.capture.packing import Packing, find_packing

# Of attention, and of Mamba and its like.
_CACHES = ("past_key_values", "cache_params")

Reader = Callable[[str, Tensor | None, Tensor | None], None]
Guard = Callable[[str], AbstractContextManager[None]]


class Capture:
    """Calls ``reader(key, hidden_states, attention_mask)`` for each read point of each forward that counts.

    Each call is made inside ``guard(key)``, which decides what becomes of an exception. ``hidden_states`` is None
    where a module gave something without a tensor in it. A forward counts unless a key-value cache is handed to it
    (generation) and, with ``training_only``, unless it is in training mode with gradients; with ``same_adapters``,
    unless the adapters that are on are others than at :meth:`open`. Recomputation by gradient checkpointing never
    counts. Compiled modules are read beside their graph.
    """

    def __init__(self, model: nn.Module, layers: Layers, reader: Reader, guard: Guard) -> None:
        self._model = model
        self._layers = layers
        self._reader = reader
        self._guard = guard
        self._undo: list[Callable[[], None]] = []
        self._training_only = False
        self._adapters: AdapterState | None = None
        self._outer_mask: Tensor | None = None
        self._sample_mask: Tensor | None = None
        self._beside = False
        self._depth = 0
        self._counts = True
        self._masks: list[Tensor] = []
        self._packing: Packing | None = None

    def open(
        self,
        *,
        training_only: bool = False,
        same_adapters: bool = False,
        attention_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
    ) -> None:
        """Begin to read. ``attention_mask`` goes before any that the model is given, ``sample_mask`` on top of it."""
        self.close()
        self._training_only = training_only
        self._outer_mask = attention_mask
        self._sample_mask = sample_mask
        with self._guard("all"):
            self._adapters = AdapterState(self._model) if same_adapters else None
            entrance = compiled_entrance(self._model, self._layers)
            if entrance is None:
                self._undo.extend(handle.remove for handle in self._hooks())
            else:
                self._undo.append(meet(entrance, self._read_beside))

    def close(self) -> None:
        """Take the hooks away; nothing of the forward stays behind."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._adapters = None
        self._outer_mask = self._sample_mask = None
        self._forget_forward()

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Read with plain hooks: for forwards that are known to run without a graph."""
        handles: list[RemovableHandle] = []
        try:
            handles.extend(self._hooks())
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._forget_forward()

    def _hooks(self) -> Iterator[RemovableHandle]:
        """Registers one after the other, so that those before one that fails can be removed."""
        chain = self._layers.chain
        yield from (module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in chain)
        yield from (self._read_hook(point) for point in self._layers.points)
        # After the read points: the output of a module in the chain must be read before its forward is over.
        yield from (module.register_forward_hook(self._leave, always_call=True) for module in chain)

    def _read_hook(self, point: ReadPoint) -> RemovableHandle:
        if point.where == "input":
            return point.module.register_forward_pre_hook(
                functools.partial(self._read_input, point.key), with_kwargs=True
            )
        return point.module.register_forward_hook(functools.partial(self._read_output, point.key))

    def _read_beside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._beside or not self._is_wanted(module):
            return
        self._beside = True
        try:
            with self._guard("all"), preserved(module), self.uncompiled():
                call_eagerly(module, args, kwargs)
        finally:
            self._beside = False

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self._counts = self._beside or self._is_wanted(module)
        self._depth += 1
        with self._guard("all"):
            self._look_at(_named_arguments(module, args, kwargs))

    def _is_wanted(self, module: nn.Module) -> bool:
        if self._adapters is not None and not self._adapters.unchanged():
            return False
        return not self._training_only or (module.training and torch.is_grad_enabled())

    def _look_at(self, arguments: dict[str, Any]) -> None:
        # A module in the chain may be called without its parents, so each level may be the first to see a cache.
        if any(arguments.get(cache) is not None for cache in _CACHES):
            self._counts = False
        mask = arguments.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if mask is not None:
            self._masks.append(mask > 0)  # once for all layers
        if self._packing is None and self._counts:
            self._packing = find_packing(arguments, mask)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._forget_forward()

    def _forget_forward(self) -> None:
        self._depth = 0
        self._masks.clear()
        self._packing = None

    def _read_input(self, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._read(key, module, args[0] if args else kwargs.get("hidden_states"))

    def _read_output(self, key: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._read(key, module, output)

    def _read(self, key: str, module: nn.Module, value: Any) -> None:
        with self._guard(key), torch.no_grad():
            if not self._is_read(module):
                return
            hidden_states, packing = first_tensor(value), self._packing
            if hidden_states is not None and packing is not None and hidden_states.shape[:-1] == packing.shape:
                valid, samples = packing.valid, self._sample_mask
                if samples is not None and len(samples) == packing.shape[0]:
                    valid = valid & samples.to(valid.device)[packing.tokens // packing.shape[1]]
                self._reader(key, packing.unpack(hidden_states), valid)
            else:
                self._reader(key, hidden_states, self._mask_for(hidden_states))

    def _is_read(self, module: nn.Module) -> bool:
        if _in_backward():
            return False
        if self._depth == 0:
            return self._beside or not self._training_only or module.training
        return self._counts

    def _mask_for(self, hidden_states: Tensor | None) -> Tensor | None:
        """The mask that fits; prompt tuning, for one, makes a longer one further in."""
        if hidden_states is None:
            return None
        for mask in (self._outer_mask, *self._masks):
            if mask is not None and mask.shape == hidden_states.shape[:-1]:
                return self._of_counted_samples(mask)
            if mask is not None and hidden_states.ndim == 2 and mask.numel() == hidden_states.shape[0]:
                return self._of_counted_samples(mask).flatten()
        if self._sample_mask is None or hidden_states.ndim != 3:
            return None
        return self._of_counted_samples(torch.ones_like(hidden_states[..., 0], dtype=torch.bool))

    def _of_counted_samples(self, mask: Tensor) -> Tensor:
        samples = self._sample_mask
        if samples is None or len(samples) != len(mask):
            return mask
        return (mask > 0) & samples.to(mask.device).unsqueeze(1)


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states in what a module takes or gives: a tensor, a tuple, or a model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        named = value.get("last_hidden_state")
        return named if isinstance(named, Tensor) else first_tensor(tuple(value.values()))
    if isinstance(value, tuple | list):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return None


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    try:
        return {**kwargs, **inspect.signature(module.forward).bind_partial(*args).arguments}
    except TypeError:
        return kwargs


def _in_backward() -> bool:
    # What torch.utils.checkpoint itself asks to tell a recomputation from a forward.
    return torch._C._current_graph_task_id() != -1
