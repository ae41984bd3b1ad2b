"""Threads that decompose matrices, several at a time or in the background."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Threads at a time, at most: each holds two matrices while it works.
_MOST = 8
_OMP_PAUSE_SOFT = 1


def side_by_side(solve: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Apply ``solve`` to all items on as many threads as torch may use, and return the results in order.

    LAPACK gains little from several threads for one matrix. So each thread, this one included, takes one item after the
    other, and OpenMP and MKL start no further ones there. If the last round would leave half of the threads or more
    idle, its items are solved one after the other instead, each with all threads.
    """
    count = min(torch.get_num_threads(), _MOST, len(items))
    native = _native()
    if count < 2 or native is None:
        return [solve(item) for item in items]
    left = len(items) % count
    alone = left if left <= count // 2 else 0
    results = {index: solve(items[index]) for index in range(alone)}
    waiting = list(range(alone, len(items)))

    def work() -> None:
        while True:
            try:
                index = waiting.pop()
            except IndexError:
                return
            results[index] = solve(items[index])

    with _one_thread(native):
        # One fewer than there are threads: if this one only waited, the system would often wake two on one core.
        helpers = [_helpers(os.getpid()).submit(work) for _ in range(count - 1)]
        try:
            work()
        finally:
            wait(helpers)
    while helpers:
        # An error that is raised here refers to this frame through its traceback. If the frame referred to the future
        # and so to the error in turn, what its traceback holds would stay until the garbage collector runs.
        helpers.pop().result()
    return [results[index] for index in range(len(items))]


def background() -> Executor:
    """An executor with a single thread, for decompositions in the background."""
    return _background(os.getpid())


# Cached by process id: a forked process inherits the executor of its parent, but not the threads of the executor.


@functools.cache
def _background(process: int) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="matent_callbacks")


@functools.cache
def _helpers(process: int) -> Executor:
    return ThreadPoolExecutor(_MOST - 1, thread_name_prefix="matent_callbacks", initializer=_use_one_thread)


def _use_one_thread() -> None:
    """Use one thread for calls from this thread. ``torch.set_num_threads`` would change other threads as well."""
    torch.get_num_threads()  # torch sets both numbers when it is first used in a thread, so this comes first
    native = _native()
    assert native is not None
    native.MKL_Set_Num_Threads_Local(1)
    native.omp_set_num_threads(1)


@contextmanager
def _one_thread(native: ctypes.CDLL) -> Iterator[None]:
    """Inside, calls from this thread use one thread, and afterwards as many as before."""
    # After a parallel region the threads of OpenMP spin for milliseconds, each on a core that is needed now.
    if hasattr(native, "omp_pause_resource_all"):  # since OpenMP 5.0
        native.omp_pause_resource_all(_OMP_PAUSE_SOFT)
    openmp, mkl = native.omp_get_max_threads(), native.MKL_Set_Num_Threads_Local(1)
    native.omp_set_num_threads(1)
    try:
        yield
    finally:
        native.MKL_Set_Num_Threads_Local(mkl)
        native.omp_set_num_threads(openmp)


@functools.cache
def _native() -> ctypes.CDLL | None:
    """The library of torch, if it has the functions of MKL and OpenMP that are called here."""
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    except (OSError, StopIteration):
        return None
    needed = ("MKL_Set_Num_Threads_Local", "omp_set_num_threads", "omp_get_max_threads")
    return library if all(hasattr(library, name) for name in needed) else None
