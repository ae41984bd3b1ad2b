"""The processes that share one measurement: one for plain ``matent``, or as many as ``torchrun`` starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class OtherRankError(RuntimeError):
    """Another rank failed, and says why."""


class Ranks:
    """The communication between the ranks. With one rank every method returns at once.

    Every rank calls the same methods in the same order. They exchange flags and pickled statistics in host memory, so
    gloo is enough on any machine.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes the results and prints."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.size > 1:
            dist.init_process_group("gloo")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.size > 1:
            # A thread of gloo may still need the interpreter's lock to let go of the last tensor. Before torch 2.8
            # the next line waits for that thread with the lock held; later releases abort the process when it ends.
            time.sleep(0.5)
            dist.destroy_process_group()

    def agree(self, error: Exception | None, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank sets it, unless there is an ``error`` on any rank.

        Raises:
            Exception: The error itself, on the lowest of the ranks that have one.
            OtherRankError: On the other ranks.
        """
        lowest = torch.tensor([self.rank if flag else self.size for flag in (error is not None, *flags)])
        if self.size > 1:
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        failed, *set_by = lowest.tolist()
        if error is not None and failed == self.rank:
            raise error
        if failed < self.size:
            raise OtherRankError from error
        return [rank < self.size for rank in set_by]

    def from_first(self, value: Any) -> Any:
        """Return the ``value`` of the first rank."""
        if self.size == 1:
            return value
        shared = [value if self.is_first else None]
        dist.broadcast_object_list(shared)
        return shared[0]

    def to_first(self, value: Any) -> Iterator[Any]:
        """Yield on the first rank the values of the others, one at a time, since they may be large."""
        for rank in range(1, self.size):
            received = [value]
            if self.is_first:
                dist.recv_object_list(received, src=rank)
                yield received[0]
            elif self.rank == rank:
                dist.send_object_list(received, dst=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside on one rank raise on all ranks, as :meth:`agree` does."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.agree(error)
