"""What each process does in the tests of sequences that are spread over ranks."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate import pieces
from matent_callbacks.accumulate.split_sequences import SplitSequences
from matent_callbacks.capture.meshes import parallel_groups
from tests.distributed.groups_on_ranks import METRICS, WIDTH, Stack

Batch = tuple[torch.Tensor, torch.Tensor]
# Where the first of two ranks has its part of each batch; the second has what is left.
CUTS = (5, 0, 11)


def batches(data_rank: int) -> list[Batch]:
    """Whole sequences: padding on either side, no token, tokens that are not finite, means far from 0, and sinks."""
    generator = torch.Generator().manual_seed(data_rank)
    found = []
    for number, length in enumerate((13, 9, 40)):
        hidden = torch.randn(2 + data_rank + number, length, WIDTH, generator=generator)
        hidden += (0, 3, 1000)[number] * torch.randn(WIDTH, generator=generator)
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
        mask[0, 4:], mask[1, :3], mask[-1] = 0, 0, int(number != 1)
        hidden[1, 5], hidden[0, 1, 3] = torch.inf, torch.nan
        # In the first batch a sink in the part of each rank, in the second so many long tokens that none is a sink.
        if number == 0:
            hidden[-1, [1, 12]] *= 20
        elif number == 1:
            hidden[1, 6:8] *= 20
        found.append((hidden, mask))
    return found


def parts(data_rank: int, place: int) -> list[Batch]:
    return [
        (hidden[:, :cut], mask[:, :cut]) if place == 0 else (hidden[:, cut:], mask[:, cut:])
        for cut, (hidden, mask) in zip(CUTS, batches(data_rank), strict=True)
    ]


def read(seen: list[Batch], **arguments: Any) -> dict[str, float]:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh())
    metrics = (*METRICS, "sink_tokens", "token_norm", "anisotropy", "top_dimension_share", "correlation_effective_rank")
    monitor = EntropyMonitor(model, layers="*", **{"metrics": metrics, **arguments})
    for hidden, mask in seen:
        monitor.start(attention_mask=mask)
        model(hidden)
        monitor.stop()
    return monitor.compute()


def in_context(rank: int, world_size: int, small_pieces: bool, dtype: torch.dtype) -> dict[str, float]:
    """Ranks 0 and 1 hold the parts of some sequences, ranks 2 and 3 those of others."""
    groups = parallel_groups(init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp_shard", "cp")))
    with mock.patch.object(pieces, "_PIECE", 3 * WIDTH * 4 if small_pieces else pieces._PIECE):
        return read(parts(rank // 2, rank % 2), dtype=dtype, **groups._asdict())


def fails(*args: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def failing(rank: int, world_size: int, fault: str) -> dict[str, Any]:
    """Something fails for one layer on rank 1, in the second of three forwards."""
    model, metrics = Stack(2), ("matrix_entropy", "sequence_matrix_entropy")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = EntropyMonitor(model, layers="all", metrics=metrics, context_group=dist.group.WORLD, on_error="warn")
        found = []
        for number in range(3):
            here = number == 1 and rank == 1
            hidden = torch.randn(2 + (here and fault == "batch"), 5 + rank, WIDTH)
            patches = []
            if here and fault in ("_sum_up", "pieces", "_add_up"):
                # Only for the second layer that is read.
                own, layers = getattr(SplitSequences, fault), []

                def second(self: Any, *args: Any, own: Any = own, layers: list[Any] = layers, **kwargs: Any) -> Any:
                    layers += [] if self in layers else [self]
                    return own(self, *args, **kwargs) if self is layers[0] else fails()

                patches.append(mock.patch.object(SplitSequences, fault, second))
            if here and fault == "output":
                hook = model.layers[0].register_forward_hook(lambda *_: torch.zeros(2, 3, 4, WIDTH))
            if here and fault == "mask":
                patches.append(mock.patch("matent_callbacks.capture.forward.Forward.tokens", fails))
            for patch in patches:
                patch.start()
            if here and fault == "open":
                patches = [mock.patch.object(monitor._capture, "_hooks", fails)]
                patches[0].start()
            with monitor:
                model(hidden)
            for patch in patches:
                patch.stop()
            if here and fault == "output":
                hook.remove()
            if number:
                found.append(monitor.compute())
    total = torch.ones(())
    dist.all_reduce(total)
    return {"found": found, "warnings": [str(w.message) for w in caught], "in step": total.item()}


def refused(rank: int, world_size: int) -> list[str]:
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = EntropyMonitor(Packable(), layers="0", context_group=dist.group.WORLD, on_error="warn")
        with monitor:
            # Only in the part of rank 0 a document begins.
            monitor.model(torch.randn(1, 4, WIDTH), position_ids=torch.tensor([[0, 1, rank * 2, 1 + rank * 2]]))
        assert monitor.compute() == {}
        told += [str(w.message) for w in caught]
    alone = [dist.new_group([0]), dist.new_group([1])]
    try:
        EntropyMonitor(Stack(1), process_group=alone[rank], context_group=dist.group.WORLD)
    except ValueError as error:
        told.append(str(error))
    try:
        EntropyMonitor(Stack(1), metrics=["matrix_entropy", "curvature"], context_group=dist.group.WORLD)
    except ValueError as error:
        told.append(str(error))
    return told


class Packable(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self[0](hidden)
