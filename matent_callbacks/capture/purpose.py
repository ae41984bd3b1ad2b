"""Tells what a forward is for: by the functions and the backward pass that it runs in, its cache, its adapters."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from matent_callbacks.capture.values import all_modules

# Names of a key-value cache: all models of transformers from 5.24 on; before, attention; Mamba and similar models.
_CACHES = ("cache", "past_key_values", "cache_params")


def is_generating(parts: Collection[nn.Module]) -> bool:
    """Whether this runs inside a function or method named ``generate``, whose first argument is a model of ``parts``.

    All frameworks' models generate by such a method, wrapped or not, with a cache or without one, and hand the model
    on to others only inside of it.
    """
    for frame in frames():
        code = frame.f_code
        if code.co_name == "generate" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module) and any(module in parts for module in first.modules()):
                return True
    return False


def functions_running() -> int:
    """How many autograd functions run now, in whose ``forward`` there are no gradients.

    Reentrant checkpointing is one: what is computed in it for the first time is what is differentiated later.
    """
    count = 0
    for frame in frames():
        code = frame.f_code
        count += code.co_name == "forward" and code.co_varnames[:1] == ("ctx",)
    return count


def backward_pass() -> int:
    """The number of the backward pass that this thread is in; -1: in none."""
    # torch.utils.checkpoint itself tells recomputation from a forward this way.
    return torch._C._current_graph_task_id()


def in_backward(since: int = -1) -> bool:
    """Whether this thread is in another backward pass than ``since`` (-1: in any)."""
    return backward_pass() != since


def has_filled_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a key-value cache among the arguments of a call holds tokens, or may hold some."""
    return any(_is_filled(arguments.get(name)) for name in _CACHES)


class AdapterState:
    """The adapters that were active when this was created."""

    def __init__(self, model: nn.Module) -> None:
        # Recognised by the attributes used here, so that peft need not be imported; all layers are switched together.
        self._layer: Any = next((m for m in all_modules(model) if hasattr(type(m), "adapter_layer_names")), None)
        self._wrapper: Any = next((m for m in all_modules(model) if hasattr(type(m), "get_base_model")), None)
        self._before = self._now()

    def unchanged(self, *, in_training: bool) -> bool:
        """Whether the same adapters are active now; ``in_training``: or others that are trained as well."""
        (layers, wrapper), (layers_before, wrapper_before) = self._now(), self._before
        if in_training and layers is not None and layers_before is not None:
            layers, layers_before = layers[:1], layers_before[:1]  # whether they are switched off
        return (layers, wrapper) == (layers_before, wrapper_before)

    def _now(self) -> tuple[Any, ...]:
        layer, wrapper = self._layer, self._wrapper
        in_layers = None if layer is None else (layer.disable_adapters, list(layer.active_adapters))
        # Prompt tuning is not in any layer: PEFT disables it by replacing the `forward` of the outermost model.
        return in_layers, None if wrapper is None else wrapper.forward


def _is_filled(cache: Any) -> bool:
    if isinstance(cache, bool | None):
        return False
    if isinstance(cache, tuple | list):
        return len(cache) > 0
    try:
        return bool(cache.get_seq_length() > 0)
    except Exception:  # of another kind, such as the state of a recurrent model
        return True


def frames() -> list[FrameType]:
    """Return the frames of the functions that are running, the innermost first."""
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found
