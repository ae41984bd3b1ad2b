"""FSDP2 on gloo: sharded models are read as whole ones are, in forwards of their own and on the side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matent_callbacks import EntropyMonitor
from tests.conftest import text_examples
from tests.distributed.fsdp_on_ranks import METRICS, on_rank, own_batches, probe
from tests.distributed.reading import layer_names, over_examples, pooled, small_llama
from tests.ranks import run_on_ranks

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("needs a torch whose FSDP2 runs on the CPU, which 2.6 is not")
    return run_on_ranks(on_rank, WORLD_SIZE, str(tmp_path_factory.mktemp("ranks")))


def with_weights(weights: dict[str, torch.Tensor]) -> Any:
    model = small_llama()
    model.load_state_dict(weights)
    return model


def on_probe(model: Any, metrics: tuple[str, ...]) -> dict[str, float]:
    monitor = EntropyMonitor(model, layers="all", metrics=metrics, dtype=torch.float64)
    monitor.read(probe())
    return monitor.compute()


def test_a_sharded_model_in_a_loop_of_ones_own(results):
    loops = [result["loop"] for result in results]
    model = small_llama()
    monitor = EntropyMonitor(model, layers="all", metrics=METRICS, dtype=torch.float64)
    with monitor:
        for rank in range(WORLD_SIZE):
            for batch in own_batches(rank):
                model(**batch)
    expected = monitor.compute()
    assert len(expected) == len(METRICS) * 3
    for loop in loops:
        assert loop["sharded"]
        assert loop["forwards"] == pytest.approx(expected, rel=1e-5)
        assert loop["probed"] == pytest.approx(on_probe(model, METRICS), rel=1e-5)
        assert loop["forwards"] == loops[0]["forwards"]
        assert loop["probed"] == loops[0]["probed"]


def test_lightning_with_model_parallel_strategy(results):
    runs = [result["lightning"] for result in results]
    for step in (2, 4):
        expected = pooled((hidden[-1], mask) for hidden, mask in (run["seen"][step - 1] for run in runs))
        assert runs[0]["steps"][step] == pytest.approx(expected, rel=1e-5)
    expected = on_probe(with_weights(runs[0]["weights"]), ("rankme",))["rankme/last"]
    assert runs[0]["probed"][4] == pytest.approx(expected, rel=1e-4)
    for run in runs:
        assert (run["steps"], run["probed"]) == (runs[0]["steps"], runs[0]["probed"])


def test_trainer_with_a_sharded_model(results):
    runs = [result["trainer"] for result in results]
    assert [record["step"] for record in runs[0]["steps"]] == [2, 4]
    for record in runs[0]["steps"]:
        states = [run["seen"][record["step"] - 1] for run in runs]
        for i, name in enumerate(layer_names(3)):
            expected = pooled((hidden[i], mask) for hidden, mask in states)
            assert record[f"matrix_entropy/{name}"] == pytest.approx(expected, rel=1e-5)
    model = with_weights(runs[0]["weights"])
    last = on_probe(model, ("rankme",))["rankme/last"]
    assert runs[0]["steps"][-1]["rankme/last"] == pytest.approx(last, rel=1e-4)
    for key, value in over_examples(model, text_examples(13)).items():
        assert runs[0]["evaluated"][f"eval_{key}"] == pytest.approx(value, rel=1e-5)
    for run in runs:
        assert run["trained"]
        assert run["steps"] == runs[0]["steps"]
