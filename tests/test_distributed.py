"""Real processes: every rank has the value of all tokens, a rank without tokens included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from matent_callbacks import EffectiveRank, EntropyMonitor, MatrixEntropy, SequenceEffectiveRank, SequenceMatrixEntropy
from tests.ranks import run_on_ranks


def collection(**arguments: Any) -> MetricCollection:
    return MetricCollection(
        {
            "entropy": MatrixEntropy(**arguments),
            "global": MatrixEntropy(center="global", normalize=False, **arguments),
            "rank": EffectiveRank(**arguments),
            "by_rank": MatrixEntropy(normalize_by="log_rank", **arguments),
            "sequence": SequenceMatrixEntropy(**arguments),
            "sequence_rank": SequenceEffectiveRank(**arguments),
        }
    )


def share(rank: int) -> list[torch.Tensor]:
    """What a rank sees: other sizes and lengths on each, nothing at all on rank 1; a mean of 1,000 times the spread."""
    if rank == 1:
        return []
    generator = torch.Generator().manual_seed(rank)
    return [1000 + torch.randn(1 + rank, 9 + 4 * i + rank, 12, generator=generator) for i in range(3)]


def metrics_on_rank(rank: int, world_size: int, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    metrics = collection(dtype=dtype)
    for hidden in share(rank):
        metrics.update(hidden)
    first = {name: value.item() for name, value in metrics.compute().items()}
    # The state of the rank is its own again, so that accumulation goes on.
    for hidden in share(rank + 2):
        metrics.update(hidden)
    return first, {name: value.item() for name, value in metrics.compute().items()}


def gathering_metric_on_rank(rank: int, world_size: int) -> float:
    def own_gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        return gather_all_tensors(tensor, group)

    metric = MatrixEntropy(dist_sync_fn=own_gather)
    for hidden in share(rank):
        metric.update(hidden)
    return metric.compute().item()


@pytest.mark.parametrize(("world_size", "dtype", "rel"), [(2, torch.float32, 1e-5), (4, torch.float64, 1e-10)])
def test_metrics_have_the_value_of_all_ranks(world_size, dtype, rel):
    results = run_on_ranks(metrics_on_rank, world_size, dtype)
    alone = collection(dtype=dtype)
    for rank in range(world_size):
        for hidden in share(rank):
            alone.update(hidden)
    first = {name: pytest.approx(value.item(), rel=rel) for name, value in alone.compute().items()}
    for rank in range(world_size):
        for hidden in share(rank + 2):
            alone.update(hidden)
    second = {name: pytest.approx(value.item(), rel=rel) for name, value in alone.compute().items()}
    for result in results:
        assert result == (first, second)
        assert result == results[0]


def test_a_gather_of_the_users_own_is_used():
    alone = MatrixEntropy()
    for rank in range(4):
        for hidden in share(rank):
            alone.update(hidden)
    for value in run_on_ranks(gathering_metric_on_rank, 4):
        assert value == pytest.approx(alone.compute().item(), rel=1e-5)


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(12, 12)) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def monitored(ranks: list[int]) -> dict[str, float]:
    torch.manual_seed(0)
    model = Blocks()
    monitor = EntropyMonitor(model, layers="all", metrics=("matrix_entropy", "rankme", "sequence_effective_rank"))
    with monitor:
        for rank in ranks:
            for hidden in share(rank):
                model(hidden - 1000)
    return monitor.compute()


def monitor_on_rank(rank: int, world_size: int) -> dict[str, float]:
    return monitored([rank])


@pytest.mark.parametrize("world_size", [2, 4])
def test_monitor_has_the_values_of_all_ranks(world_size):
    results = run_on_ranks(monitor_on_rank, world_size)
    expected = {key: pytest.approx(value, rel=1e-5) for key, value in monitored(list(range(world_size))).items()}
    assert len(expected) == 9
    for result in results:
        assert result == expected
        assert result == results[0]
