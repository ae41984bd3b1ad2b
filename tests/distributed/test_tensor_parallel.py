"""A model of transformers under tensor parallelism, on gloo: read as a whole one is, each token once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", minversion="1.12", reason="needs accelerate 1.12: tensor parallelism in the Trainer")

from matent_callbacks import EntropyMonitor
from tests.conftest import text_examples
from tests.distributed.reading import layer_names, over_examples, pooled, small_llama
from tests.distributed.tensor_parallel_on_ranks import EVALUATED, on_rank, probe
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    small_llama().save_pretrained(folder / "model")
    return run_on_ranks(on_rank, 2, str(folder), str(folder / "model"))


def model_at(step: int, results: list[dict[str, Any]]) -> Any:
    """As it was before the step; -1: in the end."""
    model = small_llama()
    model.load_state_dict(results[0]["read"]["weights"][step])
    return model


def test_a_training_step_is_read_as_in_one_process(results):
    runs = [result["read"] for result in results]
    assert all(run["sharded"] == "DTensor" for run in runs)
    for step, batch in enumerate(runs[0]["seen"]):
        assert all(torch.equal(run["seen"][step]["input_ids"], batch["input_ids"]) for run in runs)
        with torch.no_grad():
            states = model_at(step, results)(**batch, output_hidden_states=True).hidden_states
        for name, hidden in zip(layer_names(3), states, strict=True):
            expected = pooled([(hidden, batch["attention_mask"])])
            for run in runs:
                assert run["log"][step][f"matrix_entropy/{name}"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_counts_each_sample_alike(results):
    for key, expected in over_examples(model_at(-1, results), text_examples(EVALUATED)).items():
        for result in results:
            assert result["read"]["evaluated"][f"eval_{key}"] == pytest.approx(expected, rel=1e-5)


def test_a_probe(results):
    monitor = EntropyMonitor(model_at(-1, results), metrics="rankme")
    monitor.read(probe())
    expected = monitor.compute()["rankme/last"]
    for result in results:
        (record,) = [record for record in result["read"]["log"] if "rankme/last" in record]
        assert record["rankme/last"] == pytest.approx(expected, rel=1e-5)


def test_training_is_bitwise_the_same(results):
    for result in results:
        read, plain = result["read"], result["plain"]
        for with_it, without in zip(read["weights"], plain["weights"], strict=True):
            assert all(torch.equal(with_it[name], without[name]) for name in without)
        losses = [record["loss"] for record in plain["log"] if "loss" in record]
        assert losses == [record["loss"] for record in read["log"] if "loss" in record]
        assert torch.equal(read["random"], plain["random"])
