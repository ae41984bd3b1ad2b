"""Threads that decompose matrices, side by side or in the background."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch

# Each holds two matrices while it works.
_MOST = 8


def solvers() -> Executor | None:
    """As many threads as torch may use, each of which keeps to itself; ``None`` where there is no more than one.

    LAPACK gains little from several threads a matrix, and several matrices at once would want as many each.
    """
    return _solvers(os.getpid())


def background() -> Executor:
    """One thread for what has time."""
    return _background(os.getpid())


# By process: a fork has the executor of its parent, but not its threads.


@functools.cache
def _background(process: int) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="matent_callbacks")


@functools.cache
def _solvers(process: int) -> Executor | None:
    count = min(torch.get_num_threads(), _MOST)
    keep_to_itself = _single_threaded()
    if count == 1 or keep_to_itself is None:
        return None
    return ThreadPoolExecutor(count, thread_name_prefix="matent_callbacks", initializer=keep_to_itself)


def _single_threaded() -> Callable[[], None] | None:
    """What makes OpenMP and MKL use one thread when they are called from the calling thread, and only from there.

    ``torch.set_num_threads`` would not do: it changes what training runs with, too.
    """
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        setters = library.MKL_Set_Num_Threads_Local, library.omp_set_num_threads
    except (AttributeError, OSError, StopIteration):
        return None

    def initialize() -> None:
        torch.get_num_threads()  # torch sets both once in each thread: it must have done so
        for setter in setters:
            setter(1)

    return initialize
