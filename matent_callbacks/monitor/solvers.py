"""Threads that decompose matrices, side by side or in the background."""

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

# Each holds two matrices while it works.
_MOST = 8
_OMP_PAUSE_SOFT = 1


def side_by_side(solve: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Results of all items, as many at once as torch may use threads, each of which keeps to itself.

    LAPACK gains little from several threads a matrix, and several matrices at once would want as many each. Only where
    a last round would leave half of the threads or more without work, its items have all of them, one after the other.
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
    for helper in helpers:
        helper.result()
    return [results[index] for index in range(len(items))]


def background() -> Executor:
    """One thread for what has time."""
    return _background(os.getpid())


# By process: a fork has the executor of its parent, but not its threads.


@functools.cache
def _background(process: int) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="matent_callbacks")


@functools.cache
def _helpers(process: int) -> Executor:
    native = _native()
    assert native is not None
    return ThreadPoolExecutor(_MOST - 1, thread_name_prefix="matent_callbacks", initializer=native.keep_to_itself)


class _Native:
    """How many threads OpenMP and MKL use when they are called from the calling thread, and only from there.

    ``torch.set_num_threads`` would not do: it changes what other threads run with, too.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        self._set_mkl = library.MKL_Set_Num_Threads_Local
        self._set_openmp, self._openmp = library.omp_set_num_threads, library.omp_get_max_threads
        # Since OpenMP 5.0.
        self._pause = getattr(library, "omp_pause_resource_all", lambda kind: None)

    def keep_to_itself(self) -> None:
        """One thread from here on."""
        torch.get_num_threads()  # torch sets both once in each thread: it must have done so
        self._set_mkl(1)
        self._set_openmp(1)

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """One thread inside, and afterwards as many as before."""
        # Those of the last parallel region would go on looking for work for milliseconds, each on a core of its own.
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
