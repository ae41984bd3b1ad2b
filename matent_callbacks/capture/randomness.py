"""Restores the global random states of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def same_random_numbers(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """After this, random numbers are drawn as if nothing had been drawn inside: on the CPU and on ``devices``."""
    # Where nobody has imported NumPy, nobody draws from it.
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            indices = [] if device.index is None else [device.index]
            stack.enter_context(torch.random.fork_rng(indices, device_type=device.type))
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
