"""DeepSpeed's ZeRO on gloo: one reading of the tokens of all ranks, whatever of the model is sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs deepspeed")

from matent_callbacks import EntropyMonitor
from tests.conftest import text_examples
from tests.distributed.deepspeed_on_ranks import EVALUATED, STEPS, on_rank, probe
from tests.distributed.reading import layer_names, over_examples, pooled, small_llama
from tests.ranks import run_on_ranks

WORLD_SIZE = 2


@pytest.fixture(scope="module", params=[1, 2, 3], ids="ZeRO-{}".format)
def stage(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def results(stage: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, WORLD_SIZE, str(tmp_path_factory.mktemp("ranks")), stage)


def with_weights(weights: dict[str, torch.Tensor]) -> Any:
    model = small_llama()
    model.load_state_dict(weights)
    return model


def test_a_training_step_is_read_over_all_ranks(results, stage):
    runs = [result["read"] for result in results]
    steps = [record for record in runs[0]["log"] if "matrix_entropy/last" in record]
    assert [record["step"] for record in steps] == [2, 4]
    for record in steps:
        model = with_weights(runs[0]["weights"][record["step"] - 1])
        batches = [run["seen"][record["step"] - 1] for run in runs]
        with torch.no_grad():
            states = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
        for i, name in enumerate(layer_names(3)):
            tokens = [(hidden[i], batch["attention_mask"]) for hidden, batch in zip(states, batches, strict=True)]
            assert record[f"matrix_entropy/{name}"] == pytest.approx(pooled(tokens), rel=1e-5)
    for run in runs:
        assert run["engine"] == "DeepSpeedEngine"
        assert run["sharded"] == (stage == 3)
        assert [record for record in run["log"] if "matrix_entropy/last" in record] == steps


def test_a_probe_runs_through_the_weights_of_all_ranks(results):
    run = results[0]["read"]
    for record in run["log"]:
        if "rankme/last" in record:
            monitor = EntropyMonitor(with_weights(run["weights"][record["step"]]), metrics="rankme")
            monitor.read(probe())
            assert record["rankme/last"] == pytest.approx(monitor.compute()["rankme/last"], rel=1e-5)


def test_samples_that_accelerate_repeats_count_once(results):
    runs = [result["read"] for result in results]
    for key, value in over_examples(with_weights(runs[0]["weights"][-1]), text_examples(EVALUATED)).items():
        for run in runs:
            assert run["evaluated"][f"eval_{key}"] == pytest.approx(value, rel=1e-5)


def test_training_is_bitwise_the_same(results):
    for result in results:
        read, plain = result["read"], result["plain"]
        assert len(plain["weights"]) == STEPS + 1
        for with_it, without in zip(read["weights"], plain["weights"], strict=True):
            assert all(torch.equal(with_it[name], without[name]) for name in without)
        assert any((plain["weights"][-1][name] != plain["weights"][0][name]).any() for name in plain["weights"][0])
        losses = [record["loss"] for record in plain["log"] if "loss" in record]
        assert losses == [record["loss"] for record in read["log"] if "loss" in record]
        assert torch.equal(read["random"], plain["random"])
