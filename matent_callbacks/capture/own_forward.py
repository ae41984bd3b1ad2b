"""Tells from the calls in a model of one's own what its modules do not: where its last hidden state is, its layout."""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.values import first_tensor, input_states

Tails = dict[str, "tuple[ReadPoint, Tensor | None] | None"]
"""By layer: what the last block gave in this forward; None: a norm has followed it."""

# How far to look back for what a tensor was computed from: a few operations, not another model.
_STEPS = 2000


class OwnForwards:
    """What the forwards of a model of one's own have shown, which is not told by its modules."""

    def __init__(self) -> None:
        self._followed: set[str] = set()
        self._called_before: set[nn.Module] = set()
        self._told: set[str] = set()
        self.layout: bool | None = None
        """Whether the blocks take the sequence first, once it is known."""

    def input_states(self, point: ReadPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states that a block is called with."""
        if not point.is_own:
            return args[0] if args else kwargs.get("hidden_states")
        value, is_told = input_states(module, args, kwargs)
        if not is_told:
            self._warn(
                f"Layer {point.key!r} is read at the first tensor that {type(module).__name__} is called with: which "
                "of several are the hidden states is not told by their names or dimensions."
            )
        return value

    def compare(self, states: Tensor, query: Tensor | None) -> None:
        """Learn the layout of a block from what it and the attention in it, which takes the sequence first, get."""
        if self.layout is None and query is not None:
            self.layout = _is_same_layout(states, query)
            if self.layout is None:
                self._warn(
                    "Hidden states are read as (T, B, d), as attention without `batch_first` takes them: where batches "
                    "are as large as sequences are long, it is not seen whether the blocks around it do, too."
                )

    def in_layout(self, point: ReadPoint) -> ReadPoint:
        """A read point with the layout that is known by now."""
        if not (point.is_own and point.sequence_first) or self.layout is None:
            return point
        return replace(point, sequence_first=self.layout, is_own=False)

    def settle(self, tails: Tails, point: ReadPoint, given: tuple[Any, ...], output: Any) -> ReadPoint | None:
        """Where to read what a module gave, if it is to be read; ``given``: what it was called with.

        The last block is read unless a norm follows it, and where one is known to follow, the norm alone.
        """
        if point.role != "norm":
            tails[point.key] = point, first_tensor(output)
            return point if point.role == "block" and point.key not in self._followed else None
        if point.key not in tails:
            self._called_before.add(point.module)  # such as a norm of embeddings
        tail = tails.get(point.key)
        if tail is None:
            return None
        block, states = tail
        normed = first_tensor(given)
        is_near = point.is_near and point.module not in self._called_before
        if states is None or normed is None or not _is_normed(states, normed, is_near=is_near):
            return None
        tails[point.key] = None
        self._followed.add(point.key)
        return replace(
            point, sequence_first=block.sequence_first != _is_transposed(states, normed), is_own=block.is_own
        )

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)


def _is_normed(states: Tensor, given: Tensor, *, is_near: bool) -> bool:
    """Whether a norm is given the hidden states; ``is_near``: or perhaps what an operation such as dropout made."""
    if states.is_nested or given.is_nested:  # torch's fast path ends with padding
        return is_near
    if states.ndim != given.ndim or states.shape[-1] != given.shape[-1]:
        return False
    # Near it, tokens such as registers may have been left out.
    return is_near or (states.numel() == given.numel() and _same_memory(states, given))


def _is_transposed(states: Tensor, given: Tensor) -> bool:
    """Whether a norm is given hidden states with the first two dimensions exchanged."""
    if states.is_nested or given.is_nested or states.ndim != 3 or given.ndim != 3:
        return False
    if states.shape != given.shape:
        return states.shape[:2] == given.shape[1::-1]
    if states.shape[0] != states.shape[1]:
        return False
    return states.stride()[:2] != given.stride()[:2] and states.stride()[:2] == given.stride()[1::-1]


def _is_same_layout(states: Tensor, query: Tensor) -> bool | None:
    """Whether attention inside a block is called on what has the layout of its hidden states; None: not known."""
    if states.ndim != 3 or query.ndim != 3 or states.is_nested or query.is_nested or states.shape[0] == states.shape[1]:
        return None
    if states.shape[:2] == query.shape[:2]:
        return True
    return False if states.shape[:2] == query.shape[1::-1] else None


def comes_from(given: Tensor, states: Tensor) -> bool:
    """Whether a tensor is another one, or was computed from it, as far as that is known."""
    if given is states or (given.numel() == states.numel() and _same_memory(given, states)):
        return True
    if states.grad_fn is None:
        return False
    seen: set[Any] = set()
    waiting = deque([given.grad_fn])
    while waiting and len(seen) < _STEPS:
        node = waiting.popleft()
        if node is states.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return False


def _same_memory(a: Tensor, b: Tensor) -> bool:
    # Of others, such as distributed tensors, the memory is not their own.
    if any(type(x) is not Tensor or x.layout != torch.strided for x in (a, b)):
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
