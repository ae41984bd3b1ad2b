"""The Lightning callbacks under ``strategy="ddp"``: one reading of the tokens of all, on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import text_examples
from tests.distributed.lightning_on_ranks import EVALUATION_SIZES, FSDP2_RUNS_HERE, on_rank
from tests.distributed.reading import over_examples, pooled, small_llama
from tests.ranks import run_on_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_ranks(on_rank, request.param, str(tmp_path_factory.mktemp("ranks")))


def part(results: Results, name: str) -> Results:
    return [result[name] for result in results]


def test_a_training_step_is_read_over_all_ranks(results):
    right = part(results, "right")
    assert set(right[0]["steps"]) == {2, 3, 4}  # kept until it is logged again
    for result in right:
        assert result["steps"] == right[0]["steps"]
    for step in (2, 4):
        states = [result["seen"][step - 1] for result in right]
        expected = pooled((hidden[0], mask) for hidden, mask in states)
        assert right[0]["steps"][step] == pytest.approx(expected, rel=1e-5)


def test_samples_that_the_sampler_repeats_count_once(results):
    right = part(results, "right")
    model = small_llama()
    model.load_state_dict(right[0]["weights"])
    expected = {f"test_{key}": value for key, value in over_examples(model, text_examples(13)).items()}
    assert {key: right[0]["tested"][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    for i, size in enumerate(EVALUATION_SIZES):
        for key, value in over_examples(model, text_examples(size)).items():
            assert right[0]["validated"][f"val_{key}/dataloader_idx_{i}"] == pytest.approx(value, rel=1e-5)
    for result in right:
        assert (result["validated"], result["tested"]) == (right[0]["validated"], right[0]["tested"])


def test_a_model_from_configure_model_is_read_as_one_from_init(results):
    for result in part(results, "late"):
        assert "val_matrix_entropy/layer_00" in result["init"]
        assert result["ddp"] == result["init"]
        assert ("sharded" in result) == FSDP2_RUNS_HERE
        assert result.get("sharded", result["init"]) == pytest.approx(result["init"], rel=1e-4)


def test_a_mask_that_fails_on_one_rank_leaves_the_reading_of_the_others(results):
    failing = part(results, "failing")
    states = [result["seen"][0] for rank, result in enumerate(failing) if rank != 1]
    expected = pooled((hidden[-1], mask) for hidden, mask in states)
    assert failing[0]["masked"][1] == pytest.approx(expected, rel=1e-5)
    for rank, result in enumerate(failing):
        assert result["masked"] == failing[0]["masked"]
        assert any("Monitoring failed: KeyError" in text for text in result["warnings"]) == (rank == 1)


def test_a_probe_that_fails_on_one_rank_leaves_the_reading_of_the_others(results):
    failing = part(results, "failing")
    model = small_llama()
    model.load_state_dict(failing[0]["weights"])
    ids = [5, 3, 8, 2, 1]
    expected = over_examples(model, [{"input_ids": ids, "attention_mask": [1] * 5, "labels": ids}])
    for rank, result in enumerate(failing):
        assert set(result["probed"]) == {3, 4}
        assert result["probed"][4] == pytest.approx(expected["matrix_entropy/last"], rel=1e-5)
        assert any("Monitoring failed: IndexError" in text for text in result["warnings"]) == (rank == 1)


def test_all_ranks_stop_at_the_same_step(results):
    failing = part(results, "failing")
    assert failing[0]["stopped"] < 20
    for result in failing:
        assert result["stopped"] == failing[0]["stopped"]
        assert result["trend"] == failing[0]["trend"]
