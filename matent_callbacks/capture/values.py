"""Finds arguments by name, and hidden states among other values, in what modules are called with and return."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_STATES = re.compile(
    r"^(x|xs|h|hs|z|src|tgt|inp|input|inputs|x_in|hidden|hiddens|hidden_?states?|states?|tokens?|emb\w*)$"
)


def first_tensor(value: Any) -> Tensor | None:
    """Find the hidden states in a module's input or output: a tensor, a tuple, or a mapping such as a model output.

    In a mapping, ``last_hidden_state``, else the first that could be hidden states: ``(B, T, d)``, or else ``(N, d)``.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        named = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        if "last_hidden_state" in named:
            return named["last_hidden_state"]
        floating = [item for name, item in named.items() if item.is_floating_point() and "mask" not in str(name)]
        found = (item for ndim in (3, 2) for item in floating if item.ndim == ndim)
        return next(found, next(iter(named.values()), None))
    if isinstance(value, tuple | list):
        tensors = [item for item in value if isinstance(item, Tensor)]
        return next((item for item in tensors if item.is_floating_point()), next(iter(tensors), None))
    return None


def input_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Find the hidden states that a block is called with, and whether they can be told from its other arguments.

    The first argument, unless only another one has the name of hidden states, or their dimensions.
    """
    named = named_arguments(module, args, kwargs)
    floating = {name: value for name, value in named.items() if _may_be_states(value)}
    by_name = [value for name, value in floating.items() if _STATES.search(name)]
    first = args[0] if args else next(iter(floating.values()), None)
    if "hidden_states" in floating:
        return floating["hidden_states"], True
    if any(value is first for value in by_name) or (args and not isinstance(first, Tensor)):
        return first, True
    if by_name:
        return by_name[0], len(by_name) == 1
    others = list(floating.values())
    is_first_one = any(value is first for value in others) or not others
    return first if is_first_one else others[0], len(others) < 2


def _may_be_states(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_nested or value.ndim == 3) and value.is_floating_point()


def sentence_embedding(value: Any) -> Tensor | None:
    """Find the vector per sequence that the pooling layer of sentence-transformers, and each after it, returns."""
    found = value.get("sentence_embedding") if isinstance(value, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, including those inside the batch, if one is passed on as a mapping."""
    named = kwargs
    if args:
        try:
            named = {**kwargs, **_named(module, args)}
        except TypeError:
            named = {**kwargs, "": args[0]}
    if "attention_mask" in named:
        return named
    batches = [value for value in named.values() if isinstance(value, Mapping) and "attention_mask" in value]
    return {**batches[0], **named} if len(batches) == 1 else named


# By the class of a module: inspection is slow.
_positional: WeakKeyDictionary[type[nn.Module], tuple[str, ...]] = WeakKeyDictionary()


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    kind = type(module)
    if "forward" not in vars(module):
        if kind not in _positional:
            parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # without `self`
            usual = (p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
            _positional[kind] = tuple(p.name for p in usual)
        if len(args) <= len(_positional[kind]):
            return dict(zip(_positional[kind], args, strict=False))
    return inspect.signature(module.forward).bind_partial(*args).arguments


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields. Its generators, one inside the other, are called ten times a module."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            for child in reversed(module._modules.values()):
                if child is not None:
                    waiting.append(child)
    return list(found)
