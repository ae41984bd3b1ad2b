"""Reading hidden states and their mask out of a forward pass, with hooks that exist only while they are needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from matent_callbacks.capture.layers import Layers, ReadPoint

Reader = Callable[[str, Tensor | None, Tensor | None], None]


class Capture:
    """Calls ``reader(key, hidden_states, attention_mask)`` for each read point of each forward that counts.

    ``hidden_states`` is None where a module gave something without a tensor in it.

    A forward counts unless a key-value cache is handed to it (generation) and, with ``training_only``, unless it is
    in training mode with gradients. Recomputation by gradient checkpointing never counts.
    """

    def __init__(self, layers: Layers, reader: Reader) -> None:
        self._layers = layers
        self._reader = reader
        self._handles: list[RemovableHandle] = []
        self._training_only = False
        self._depth = 0
        self._counts = True
        self._masks: list[Tensor] = []

    def open(self, *, training_only: bool = False) -> None:
        """Put the hooks in place."""
        self.close()
        self._training_only = training_only
        for module in self._layers.chain:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        for point in self._layers.points:
            self._handles.append(self._register(point))
        # After the read points: the output of a module in the chain must be read before its forward is over.
        for module in self._layers.chain:
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Take the hooks away; nothing of the forward stays behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()
        self._depth = 0

    def _register(self, point: ReadPoint) -> RemovableHandle:
        if point.where == "input":
            return point.module.register_forward_pre_hook(
                functools.partial(self._read_input, point.key), with_kwargs=True
            )
        return point.module.register_forward_hook(functools.partial(self._read_output, point.key))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _named_arguments(module, args, kwargs)
        if self._depth == 0:
            self._counts = not self._training_only or (module.training and torch.is_grad_enabled())
        # A module in the chain may be called without its parents, so each level may be the first to see a cache.
        if arguments.get("past_key_values") is not None:
            self._counts = False
        self._depth += 1
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._masks.append(mask)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth = 0
            self._masks.clear()

    def _read_input(self, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._read(key, module, args[0] if args else kwargs.get("hidden_states"))

    def _read_output(self, key: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._read(key, module, output)

    def _read(self, key: str, module: nn.Module, value: Any) -> None:
        if _in_backward():
            return
        if self._depth == 0:
            if self._training_only and not module.training:
                return
        elif not self._counts:
            return
        hidden_states = first_tensor(value)
        self._reader(key, hidden_states, self._mask_for(hidden_states))

    def _mask_for(self, hidden_states: Tensor | None) -> Tensor | None:
        """The mask that fits; prompt tuning, for one, makes a longer one further in."""
        if hidden_states is None:
            return None
        for mask in self._masks:
            if mask.shape == hidden_states.shape[:-1]:
                return mask
            if hidden_states.ndim == 2 and mask.numel() == hidden_states.shape[0]:
                return mask.flatten()
        return None


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
