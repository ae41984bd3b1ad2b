"""What each process of the tests of loops on several ranks does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from matent_callbacks import LoopMonitor
from tests.conftest import collate, text_examples
from tests.distributed.fsdp_on_ranks import whole
from tests.distributed.reading import as_if_launched, record_forwards, small_llama

STEPS, EVERY = 4, 2
LAYERS = ["all", "model.layers.*.mlp"]


def summary(logged: list[tuple[int, dict[str, float]]], seen: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"logged": logged, "seen": seen, "weights": weights}


def in_accelerate(rank: int, *, watched: bool) -> dict[str, Any]:
    """Accumulation of two batches, and an evaluation."""
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    logged: list[tuple[int, dict[str, float]]] = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "kept", False, False

        @property
        def tracker(self) -> Any:
            return self

        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            logged.append((step or 0, values))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=Tracker())
    accelerator.init_trackers("loop")
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(text_examples(2 * 2 * 2 * STEPS), batch_size=2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor = LoopMonitor(model, EVERY, LAYERS, log=accelerator, on_error="raise") if watched else None
    seen = record_forwards(accelerator.unwrap_model(model))
    step = 1
    for batch in loader:
        with (
            accelerator.accumulate(model),
            monitor.step(step, ends=accelerator.sync_gradients) if monitor else nullcontext(),
        ):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
    if monitor:
        model.eval()
        with monitor.evaluation(), torch.no_grad():
            model(**batch)
        monitor.close()
    return summary(logged, seen, whole(accelerator.unwrap_model(model)))


def in_fabric(rank: int, world_size: int, *, watched: bool) -> dict[str, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.logger import Logger
    from lightning.fabric.strategies import DDPStrategy

    logged: list[tuple[int, dict[str, float]]] = []

    class Kept(Logger):
        name, version = "kept", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step or 0, dict(metrics)))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    strategy = DDPStrategy(process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy, loggers=[Kept()], precision="bf16-mixed")
    fabric.launch()
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    probe = collate(text_examples(3, start=40))
    monitors = [
        LoopMonitor(model, EVERY, LAYERS, log=fabric, on_error="raise"),
        LoopMonitor(model, EVERY, name="probe", probe=probe, reference="start", log=fabric, on_error="raise"),
    ]
    seen = record_forwards(model.module)
    for step in range(1, STEPS + 1):
        batch = own_batch(rank, step)
        if watched:
            with monitors[0].step(step), monitors[1].step(step):
                fabric.backward(model(**batch).loss)
        else:
            fabric.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    for monitor in monitors if watched else ():
        monitor.close()
    return summary(logged, seen, whole(model.module))


def own_batch(rank: int, step: int) -> dict[str, Tensor]:
    """Sizes and lengths of each rank's own."""
    return collate(text_examples(2 + rank, 12 + 4 * rank, start=8 * step + 4 * rank))


def as_in_torchtitan(rank: int, *, watched: bool) -> dict[str, Any]:
    """Each block compiled, then sharded; no Trainer."""
    logged: list[tuple[int, dict[str, float]]] = []
    model = small_llama()
    seen = record_forwards(model)
    for block in model.model.layers:
        block.compile(backend="eager")
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def log(values: dict[str, float], step: int) -> None:
        logged.append((step, values))

    monitor = LoopMonitor(model, EVERY, "all", log=log, on_error="raise") if watched else None
    for step in range(1, STEPS + 1):
        for micro_batch in (0, 1):
            batch = own_batch(rank, 2 * step + micro_batch)
            with monitor.step(step) if monitor else nullcontext():
                model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor:
        monitor.close()
    return summary(logged, seen, whole(model))


def both(run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    return {"watched": run(*args, watched=True), "alone": run(*args, watched=False)}


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    results: dict[str, Any] = {"fabric": both(in_fabric, rank, world_size), "accelerate": both(in_accelerate, rank)}
    if hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6 has no FSDP2 on the CPU
        results["torchtitan"] = both(as_in_torchtitan, rank)
    return results
