"""Decides which of several calls of a layer is read: the last one in a pass, one with gradients before one without."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from matent_callbacks.capture.forward import Forward, Reading, Seen
from matent_callbacks.capture.layers import Layers, ReadPoint
from matent_callbacks.capture.own_forward import OwnForwards

Reader = Callable[[str, Tensor | None, Tensor | None, Tensor | None], None]
Guard = Callable[[str], AbstractContextManager[None]]

# Held while a reader runs: the threads of nn.DataParallel update the same statistics.
_reading = threading.RLock()


class Passes:
    """Reads the calls of layers in each pass over some tokens; holds those that another one may follow."""

    def __init__(self, layers: Layers, reader: Reader, guard: Guard, discard: Callable[[str], None] | None) -> None:
        self.seen = Seen()
        self._layers = layers
        self._reader = reader
        self._guard = guard
        self._discard = discard
        # Of a layer that may be read at several modules, the last one counts, until it is known which that is.
        self._called_again = {point.key for point in layers.points if point.others}

    def begin(self, forward: Forward, keys: Iterable[str]) -> None:
        """Begin a pass in which some layers run, and read what is held of them from the pass before."""
        for key in keys:
            forward.tails.pop(key, None)
            held = forward.held.pop((key, forward.passes[key]), None)
            if held is not None:
                self.record(key, held)
            forward.passes[key] += 1

    def end(self, forward: Forward, *, has_failed: bool) -> None:
        """End a forward, and read what is held of it."""
        if has_failed:
            self._forget_all(forward)
            return
        graded = {key for key, _ in forward.read | forward.held.keys()}
        alone = {own: held for own, held in forward.without_gradients.items() if own[0] not in graded}
        for (key, _), held in (forward.held | alone).items():
            self.record(key, held)

    def read(self, forward: Forward, key: str, reading: Reading, *, is_alone: bool) -> None:
        """Read one call of a layer, or hold it where another one may follow that counts in its place.

        ``is_alone``: it has no gradients, where only training counts. Then it counts if no other call has any.
        """
        own = key, forward.passes[key]
        if is_alone:
            forward.without_gradients[own] = reading.kept()
        elif key in self._called_again:
            forward.held.pop(own, None)  # in the order of the last calls, which is that of all ranks
            forward.held[own] = reading.kept()
        elif own in forward.read:
            # The first time that this is seen: the call before has been read as if it were the only one.
            self._called_again.add(key)
            if self._discard is not None:
                self._discard(key)
                if self.seen.passes[key] > 1:
                    warnings.warn(
                        f"Layer {key!r} ran several times in a forward, and once in those before: of these, the "
                        "tokens read so far are left out of this one reading.",
                        stacklevel=2,
                    )
                self.seen.passes[key] = 0
            forward.held[own] = reading.kept()
        else:
            forward.read.add(own)
            self.record(key, reading)

    def record(self, key: str, reading: Reading) -> None:
        """Call the reader."""
        with self._guard(key), torch.no_grad(), _reading:
            self.seen.passes[key] += 1
            self._reader(key, *reading)

    def settled(
        self, own: OwnForwards, forward: Forward | None, point: ReadPoint, given: tuple[Any, ...], value: Any
    ) -> ReadPoint | None:
        """Where to read a layer that may be read at several modules, if it is to be read at this one."""
        key = point.key
        if forward is None:  # no order of calls is known
            return point if point.others else None
        settled = own.settle(forward.tails, point, given, value)
        if settled is not None and settled.role == "norm":
            this = key, forward.passes[key]
            if this not in forward.read:
                self._called_again.discard(key)
            forward.held.pop(this, None)
            forward.without_gradients.pop(this, None)
        return settled

    def _forget_all(self, failed: Forward) -> None:
        """Forget what was read of all layers, since some layers have read a forward that failed in the middle."""
        own = Counter(key for key, _ in failed.read)
        if not own or self._discard is None:
            return
        if any(count > own[key] for key, count in self.seen.passes.items()):
            warnings.warn(
                "A forward failed in the middle: the tokens read so far are left out of this one reading.", stacklevel=2
            )
        for point in self._layers.points:
            self._discard(point.key)
        self.seen.passes.clear()
