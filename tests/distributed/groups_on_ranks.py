"""What each process of the tests of process groups does."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from matent_callbacks import EntropyMonitor
from matent_callbacks.capture.meshes import parallel_groups
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.distributed.reading import as_if_launched, small_llama
from tests.distributed.trainer_on_ranks import make_trainer, weights

WIDTH = 12
METRICS = (
    *("matrix_entropy", "spectrum", "rankme", "sequence_matrix_entropy", "sequence_effective_rank"),
    "holevo_information",
)


class Stack(nn.Module):
    """Blocks that are numbered as the stages of a pipeline number theirs: each from 0."""

    def __init__(self, depth: int, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(depth))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def tokens_of(rank: int) -> list[torch.Tensor]:
    """Other sizes and lengths on each rank, and nothing on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(1 + rank, 9 + 4 * i + rank, WIDTH, generator=generator) for i in range(3 * (rank != 1))]


def read(ranks: list[int], depth: int = 2, **arguments: Any) -> dict[str, float]:
    model = Stack(depth)
    monitor = EntropyMonitor(model, layers="all", **{"metrics": METRICS, **arguments})
    with monitor:
        for rank in ranks:
            for hidden in tokens_of(rank):
                model(hidden)
    return monitor.compute()


def unlike(rank: int, world_size: int, differs: str) -> dict[str, Any]:
    """Two readings and one in the background of ranks that differ in something."""
    arguments: dict[str, dict[str, Any]] = {
        "layers": {},
        "metrics": {"metrics": METRICS[: 2 + rank]},
        "solver": {"metrics": "matrix_entropy", "solver": ("exact", "approximate")[rank]},
        "dtype": {"dtype": (torch.float32, torch.float64)[rank]},
    }
    model = Stack(2 + rank if differs == "layers" else 2)
    monitor = EntropyMonitor(model, layers="all", **{"metrics": METRICS, **arguments[differs]})
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for compute in (monitor.compute, monitor.compute, lambda: monitor.compute_later()()):
            with monitor:
                model(torch.randn(2, 5, WIDTH))
            found.append(compute())
    # The ranks are still in step with each other.
    total = torch.ones(())
    dist.all_reduce(total)
    return {"found": found, "warnings": [str(w.message) for w in caught], "in step": total.item()}


def train_unlike(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The Trainer with layers that only one rank has been asked for, and with a collective that fails once."""
    as_if_launched(rank, world_size)

    def run(callbacks: list[Any]) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(folder, callbacks, model=small_llama())
            trainer.train()
        texts = [str(w.message) for w in caught if "matent" in str(w.message) or "reading" in str(w.message)]
        return {"log": trainer.state.log_history, "weights": weights(trainer.model), "warnings": texts}

    reduce, calls = dist.reduce, []

    def fails_first(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise dist.DistBackendError("unhandled system error")
        return reduce(*args, **kwargs)

    found = {"plain": run([])}
    found["unlike"] = run([MatrixEntropyCallback(1, layers="all" if rank else "last")])
    with mock.patch.object(dist, "reduce", fails_first):
        found["failing"] = run([MatrixEntropyCallback(2)])
    return found


def in_groups(rank: int, world_size: int) -> dict[str, Any]:
    """Ranks 0 and 2, and ranks 1 and 3, which have more layers."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found: dict[str, Any] = {"values": read([rank], depth=2 + rank % 2, process_group=pairs[rank % 2])}
    for name, group in {"others": pairs[1 - rank % 2], "name": "dp"}.items():
        try:
            EntropyMonitor(Stack(2), process_group=group)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


class Stage(nn.Module):
    """Some blocks of a model, and its norm if they are the last."""

    def __init__(self, blocks: range, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for number in blocks:
            torch.manual_seed(number)
            self.layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()))
        self.norm = nn.LayerNorm(WIDTH) if blocks.stop == count else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden if self.norm is None else self.norm(hidden)


def batch_of(data_rank: int) -> torch.Tensor:
    return torch.randn(4, 10, WIDTH, generator=torch.Generator().manual_seed(data_rank))


def in_a_pipeline(rank: int, world_size: int) -> dict[str, float]:
    """Two stages of two blocks each times two data ranks; rank 0 has the numbers of both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    number = mesh.get_local_rank("pp")
    model = Stage(range(2 * number, 2 * number + 2), 4)
    stage = PipelineStage(model, number, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda output, target: (output - target).square().mean())
    groups = parallel_groups(mesh)
    # After a norm one direction is empty but for rounding, and `rankme` takes the square root: hence float64.
    arguments: dict[str, Any] = {"layer_offset": 2 * number, "process_group": groups.process_group}
    monitor = EntropyMonitor(model, "all", metrics=METRICS, dtype=torch.float64, **arguments)
    hidden = batch_of(mesh.get_local_rank("dp"))

    def step() -> None:
        schedule.step(*([hidden] if number == 0 else []), **({} if number == 0 else {"target": hidden}))

    # In the first step of a schedule torch runs each stage on arbitrary values as well, to learn what shapes come out.
    step()
    with monitor:
        step()
    of_stages: list[Any] = [None] * world_size
    dist.all_gather_object(of_stages, monitor.compute())
    return {name: value for values in of_stages for name, value in values.items()}
