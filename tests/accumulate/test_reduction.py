"""Real processes: every rank has the value of all tokens, a rank without tokens included."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from matent_callbacks import (
    EffectiveRank,
    EntropyMonitor,
    MatrixEntropy,
    SequenceEffectiveRank,
    SequenceMatrixEntropy,
)
from matent_callbacks.accumulate.reduction import AllOrNone
from matent_callbacks.functional.spectrum import solved
from matent_callbacks.monitor import decomposition
from tests.ranks import run_on_ranks

WIDTH = 12


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
    return [1000 + torch.randn(1 + rank, 9 + 4 * i + rank, WIDTH, generator=generator) for i in range(3)]


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


class Collectives(TorchDispatchMode):
    """Notes every collective call and how many numbers it was given, whatever function it was made through."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func._schema.name.split("::")[1], sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def machinery_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """The ways torchmetrics offers to bring ranks together, on 4 ranks, and what each sent."""
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(2, 7 + rank, WIDTH, generator=generator) for _ in range(2)]
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: dict[str, Any] = {}

    alone = MatrixEntropy(sync_on_compute=False)
    alone.update(batches[0])
    found["alone"] = alone.compute().item()
    with alone.sync_context():
        found["in_context"] = alone._entropy().item()
    alone.update(batches[1])
    found["alone_again"] = MatrixEntropy.compute(alone).item()

    stepwise = MatrixEntropy(dist_sync_on_step=True)
    found["steps"] = [stepwise(batch).item() for batch in batches]
    found["over_steps"] = stepwise.compute().item()

    grouped = MatrixEntropy(process_group=pairs[rank // 2])
    grouped.update(batches[0])
    with Collectives() as collectives:
        found["grouped"] = grouped.compute().item()
    found["sent"] = collectives.sent
    return found


def test_torchmetrics_own_ways_of_bringing_ranks_together():
    results = run_on_ranks(machinery_on_rank, 4)
    generators = [torch.Generator().manual_seed(rank) for rank in range(4)]
    batches = [[torch.randn(2, 7 + rank, WIDTH, generator=generators[rank]) for _ in range(2)] for rank in range(4)]

    def entropy(*parts: torch.Tensor) -> Any:
        metric = MatrixEntropy()
        for part in parts:
            metric.update(part)
        return pytest.approx(metric.compute().item(), rel=1e-5)

    steps = [entropy(*(own[i] for own in batches)) for i in range(2)]
    for rank, found in enumerate(results):
        assert found["alone"] == entropy(batches[rank][0])
        assert found["alone_again"] == entropy(*batches[rank])
        assert found["in_context"] == steps[0]
        assert found["steps"] == steps
        assert found["over_steps"] == entropy(*(part for own in batches for part in own))
        first = rank - rank % 2
        assert found["grouped"] == entropy(batches[first][0], batches[first + 1][0])
        assert {name for name, _ in found["sent"]} == {"allreduce_"}
        assert sum(size for _, size in found["sent"]) <= WIDTH * (WIDTH + 1) // 2 + WIDTH + 5


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
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)) for _ in range(2))

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


def monitor_on_rank(rank: int, world_size: int) -> tuple[dict[str, float], list[tuple[str, int]], list[int]]:
    decomposed = []

    def spy(matrices: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        decomposed.append(len(matrices))
        return solved(matrices, **arguments)

    with Collectives() as collectives, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decomposition, "solved", spy)
        values = monitored([rank])
    return values, collectives.sent, decomposed


@pytest.mark.parametrize("world_size", [2, 4])
def test_monitor_has_the_values_of_all_ranks_and_shares_the_work_out(world_size):
    results = run_on_ranks(monitor_on_rank, world_size)
    expected = {key: pytest.approx(value, rel=1e-5) for key, value in monitored(list(range(world_size))).items()}
    assert len(expected) == 9
    layers, covariances, d = 3, 6, WIDTH
    for values, sent, decomposed in results:
        assert values == expected
        assert values == results[0][0]
        # Three layers twice, pooled and raw, shared out.
        assert sum(decomposed) in (covariances // world_size, -(-covariances // world_size))
        assert {name for name, _ in sent} == {"allreduce_", "reduce_"}
        halves = [size for name, size in sent if name == "reduce_"]
        assert halves == [d * (d + 1) // 2] * covariances
        # Widths, counts and means; then every number that is read, once.
        assert sum(size for name, size in sent if name == "allreduce_") <= covariances * (d + 5) + layers * 10 + 20
    assert sum(sum(decomposed) for _, _, decomposed in results) == covariances


def failing_monitor_on_rank(rank: int, world_size: int, fault: str) -> Any:
    torch.manual_seed(0)
    model = Blocks()
    if fault == "layer" and rank == 1:
        model.layers[0].register_forward_hook(lambda *_: torch.zeros(2, 3, 4, WIDTH))
    if fault == "width" and rank == 1:
        model.layers[0][0], model.layers[1][0] = torch.nn.Linear(WIDTH, 7), torch.nn.Linear(7, WIDTH)
    monitor = EntropyMonitor(
        model, layers="all", metrics=("matrix_entropy", "sequence_matrix_entropy"), on_error="warn"
    )
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        if fault == "decomposition" and rank == 1:
            patch.setattr(decomposition, "solved", lambda *_, **__: 1 / 0)
        with monitor:
            model(torch.randn(2, 5, WIDTH))
        try:
            values = monitor.compute()
        except RuntimeError as error:
            values = str(error)
    patch.undo()
    with monitor:
        model(torch.randn(2, 5, WIDTH))
    return values, monitor.compute(), [str(warning.message) for warning in caught]


def test_a_layer_that_one_rank_fails_to_read_is_left_out_on_all():
    results = run_on_ranks(failing_monitor_on_rank, 2, "layer")
    (first, second, said), (_, _, own) = results[0], results[1]
    assert set(first) == set(second) == {"matrix_entropy/layer_00", "sequence_matrix_entropy/layer_00"}
    assert results[1][:2] == (first, second)
    assert said == ["Left out, since ranks failed to read them or differ in their width: last, layer_01."]
    assert any("Reading layer 'layer_01' failed" in message for message in own)


def test_a_layer_that_is_wider_on_one_rank_is_left_out_on_all():
    for values, _, said in run_on_ranks(failing_monitor_on_rank, 2, "width"):
        assert "matrix_entropy/layer_00" in values
        assert "matrix_entropy/layer_01" not in values
        assert said == ["Left out, since ranks failed to read them or differ in their width: layer_01."]


def test_a_decomposition_that_fails_on_one_rank_is_told_on_all_and_the_next_reading_is_right():
    results = run_on_ranks(failing_monitor_on_rank, 2, "decomposition")
    for first, second, _ in results:
        assert first == "The decomposition failed on 1 rank(s)."
        assert second == results[0][1]
        assert "matrix_entropy/last" in second


def wide(ranks: list[int], solver: Any) -> dict[str, float]:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Identity()))
    monitor = EntropyMonitor(model, "0", solver=solver, metrics=("matrix_entropy", "sequence_matrix_entropy"))
    with monitor:
        for rank in ranks:
            model(torch.randn(1, 700, 1024, generator=torch.Generator().manual_seed(rank)))
    return monitor.compute()


def wide_on_rank(rank: int, world_size: int) -> dict[str, float]:
    return wide([rank], "approximate")


def test_wide_layers_are_estimated_over_all_ranks():
    first, second = run_on_ranks(wide_on_rank, 2)
    exact = wide([0, 1], "exact")
    assert first == second
    assert first.keys() - exact.keys() == {"matrix_entropy_error/0"}
    assert first["matrix_entropy/0"] == pytest.approx(exact["matrix_entropy/0"], rel=0.01)
    assert first["sequence_matrix_entropy/0"] == pytest.approx(exact["sequence_matrix_entropy/0"], rel=1e-5)


def all_or_none_on_rank(rank: int, world_size: int) -> list[str]:
    told = []
    cpu = torch.device("cpu")

    def third(failing: int) -> int:
        if rank == failing:
            raise ZeroDivisionError(f"on {rank}")
        return rank

    for failing in (-1, 1):
        try:
            with AllOrNone(cpu, [None], "elsewhere", numbers=1) as together:
                together.numbers = [third(failing) * 10]
            told.append(str(together.ranges))
        except (RuntimeError, ZeroDivisionError) as error:
            told.append(f"{type(error).__name__} {error}")
        # Every rank reaches the collective call in the block, and only the one that failed raises.
        try:
            with AllOrNone(cpu, []) as attempt:
                attempt(third, failing)
                total = torch.ones(())
                dist.all_reduce(total)
                reached = attempt(total.item)
            told.append(str(reached))
        except ZeroDivisionError as error:
            told.append(f"{total.item()} then {error}")
    return told


def test_an_error_on_one_rank_raises_on_all_and_keeps_none_waiting():
    assert run_on_ranks(all_or_none_on_rank, 3) == [
        ["[(0, 20)]", "3.0", "RuntimeError elsewhere", "3.0"],
        ["[(0, 20)]", "3.0", "ZeroDivisionError on 1", "3.0 then on 1"],
        ["[(0, 20)]", "3.0", "RuntimeError elsewhere", "3.0"],
    ]
