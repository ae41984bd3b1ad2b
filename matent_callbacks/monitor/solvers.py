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

    LAPACK gains little from several threads for one matrix. So each item has one thread, on which OpenMP and MKL start
    no further ones. If the last round would leave half of the threads or more idle, its items are solved one after the
    other instead, each with all threads.
    """
    count = min(torch.get_num_threads(), _MOST, len(items))
    native = _native()
    if count < 2 or native is None:
        return [solve(item) for item in items]
    left = len(items) % count
    alone = left if left <= count // 2 else 0
    results = {index: solve(items[index]) for index in range(alone)}
    others = list(range(alone, len(items)))

    def work() -> None:
        while others:
            try:
                index = others.pop()
            except IndexError:  # another thread was faster
                return
            results[index] = solve(items[index])

    with native.single_threaded():
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
    native = _native()
    assert native is not None
    return ThreadPoolExecutor(_MOST - 1, thread_name_prefix="matent_callbacks", initializer=native.keep_to_itself)


class _Native:
    """Sets how many threads OpenMP and MKL use for calls from the current thread, and only for those.

    ``torch.set_num_threads`` would change that number for other threads as well.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        self._set_mkl = library.MKL_Set_Num_Threads_Local
        self._set_openmp, self._openmp = library.omp_set_num_threads, library.omp_get_max_threads
        # Since OpenMP 5.0.
        self._pause = getattr(library, "omp_pause_resource_all", lambda kind: None)

    def keep_to_itself(self) -> None:
        """Use one thread for all calls from the current thread from now on."""
        torch.get_num_threads()  # torch sets both numbers when it is first used in a thread, so this comes first
        self._set_mkl(1)
        self._set_openmp(1)

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """Use one thread in the block, and as many as before afterwards."""
        # After a parallel region the threads of OpenMP spin for milliseconds, each on a core that is needed now.
        self._pause(_OMP_PAUSE_SOFT)
        openmp = self._openmp()
        mkl = self._set_mkl(1)
        self._set_openmp(1)
        try:
            yield
        finally:
            self._set_mkl(mkl)
            self._set_openmp(openmp)


@functools.cache
def _native() -> _Native | None:
    try:
        return _Native()
    except (AttributeError, OSError, StopIteration):
        return None
