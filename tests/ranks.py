"""Running a function on several real processes that talk over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the server that all ranks are forked from: on few cores that is most of the time of a test.
_HEAVY = (
    "torch.distributed.fsdp",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "lightning.pytorch",
)


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 90) -> list[Any]:
    """What ``function(rank, world_size, *args)`` returned on each rank. A rank that fails or hangs ends all of them."""
    multiprocessing.set_forkserver_preload([name for name in _HEAVY if name in sys.modules])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _on_rank, (function, world_size, folder, args), nprocs=world_size, join=False, start_method="forkserver"
        )
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        try:
            while not context.join(timeout=1):
                if datetime.datetime.now() > deadline:
                    raise TimeoutError(f"{function.__name__} did not end on {world_size} ranks within {seconds} s.")
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _on_rank(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # The server that ranks are forked from may have started while a test had a W&B service, which is gone by now.
    os.environ.pop("WANDB_SERVICE", None)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=30),
    )
    result = function(rank, world_size, *args)
    torch.save(result, f"{folder}/{rank}.pt")
    leave()


def leave() -> None:
    """End a rank once gloo's threads are idle.

    One of them may still need the interpreter's lock to let go of the last tensor. Before torch 2.8 the end of the
    group waits for it with the lock held, for ever; a process that ends meanwhile is aborted.
    """
    time.sleep(0.5)
    dist.destroy_process_group()
