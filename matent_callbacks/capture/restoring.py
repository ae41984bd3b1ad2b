"""Brings lists, dicts and tensors back to what they held before."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict, Counter))
"""The types of containers that are restored, with what is in them; those that derive from them may do more."""


def restoring(value: Any, known: set[int] | None = None) -> Callable[[], None]:
    """Return what brings a tensor or a container, and all inside, back to what it holds now."""
    known = set() if known is None else known
    if id(value) in known:
        return _nothing
    known.add(id(value))
    # Parameters, frozen ones as well, are not written to by a forward, and neither is what is part of a graph.
    if isinstance(value, Tensor) and not (isinstance(value, nn.Parameter) or value.requires_grad or value.is_meta):
        return _restoring_tensor(value)
    if type(value) not in CONTAINERS:
        return _nothing
    items = value.copy()
    inside = [restoring(item, known) for item in (items.values() if isinstance(items, dict) else items)]

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, list | deque) else value.update(items)
        for each in inside:
            each()

    return restore


def _restoring_tensor(tensor: Tensor) -> Callable[[], None]:
    values, version = tensor.detach().clone(), _version(tensor)

    def restore() -> None:
        # A tensor that was not touched is not written to either: the backward pass of an earlier forward may need it,
        # and would refuse it.
        if version is None or version != _version(tensor):
            tensor.copy_(values)

    return restore


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


def _nothing() -> None:
    pass
