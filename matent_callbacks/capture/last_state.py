"""Tells, when a model of one's own runs, whether its last hidden state is that of the last block, or a norm follows."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.values import first_tensor

Tails = dict[str, "tuple[ReadPoint, Tensor | None] | None"]
"""By layer: what the last block gave in this forward; None: a norm has followed it."""

# How far to look back for what a tensor was computed from: a few operations, not another model.
_STEPS = 2000


class LastStates:
    """Where the last hidden state is read, for layers that may be read at several modules."""

    def __init__(self) -> None:
        self._followed: set[str] = set()
        self._called_before: set[nn.Module] = set()

    def is_followed(self, key: str) -> bool:
        """Whether a norm is known to follow the last block."""
        return key in self._followed

    def settle(self, tails: Tails, point: ReadPoint, given: tuple[Any, ...], output: Any) -> ReadPoint | None:
        """Where to read what a module gave, if it is to be read; ``given``: what it was called with."""
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


def _is_normed(states: Tensor, given: Tensor, *, is_near: bool) -> bool:
    """Whether a norm is given the hidden states; ``is_near``: or perhaps what an operation such as dropout made."""
    if states.is_nested != given.is_nested:  # padded, as at the end of torch's fast path
        return is_near and states.shape[-1] == given.shape[-1] if not states.is_nested else is_near
    if states.is_nested:
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


def is_same_layout(states: Tensor, query: Tensor) -> bool | None:
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
    if a.layout != torch.strided or b.layout != torch.strided or a.is_nested or b.is_nested:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
