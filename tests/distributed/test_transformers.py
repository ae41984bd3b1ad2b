"""The Hugging Face callbacks in several processes: one reading of the tokens of all, on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import text_examples
from tests.distributed.reading import layer_names, over_examples, pooled, small_llama
from tests.distributed.trainer_on_ranks import DISPATCHED, EVALUATION_SIZES, on_rank
from tests.ranks import run_on_ranks

Results = list[dict[str, Any]]


def under_torchrun(world_size: int, folder: Path) -> Results:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command += ["--redirects", "3", "--log-dir", str(folder / "logs")]
    script = ["-m", "tests.distributed.trainer_on_ranks", str(folder)]
    output = folder / "output.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", *command, *script],
            cwd=Path(__file__).parents[2],
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as launcher,
    ):
        try:
            failed = launcher.wait(timeout=150)
        except subprocess.TimeoutExpired:
            failed = -1
            launcher.terminate()  # and it its processes, as it would not if it were killed
    # The launcher first: where a report is cut, it is the ends of the ranks that are left.
    told = [output, *sorted(folder.rglob("stderr.log"))]
    assert failed == 0, "\n".join(path.read_text()[-3000:] for path in told)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(scope="module", params=["torchrun, 2 processes", "4 processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    if request.param.startswith("torchrun"):
        return under_torchrun(2, folder)
    return run_on_ranks(on_rank, 4, str(folder))


def part(results: Results, name: str) -> Results:
    return [result[name] for result in results]


def readings(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    head = f"{prefix}matrix_entropy/"
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(head)}


def test_a_training_step_is_read_over_all_ranks(results):
    right = part(results, "right")
    assert [record["step"] for record in right[0]["steps"]] == [2, 4]
    for result in right:
        assert result["steps"] == right[0]["steps"]
    for record in right[0]["steps"]:
        states = [result["seen"][record["step"] - 1] for result in right]
        for i, name in enumerate(layer_names(3)):
            expected = pooled((hidden[i], mask) for hidden, mask in states)
            assert record[f"matrix_entropy/{name}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", [*EVALUATION_SIZES, *(("split", n) for n in EVALUATION_SIZES), "dispatched"])
def test_samples_that_accelerate_repeats_count_once(results, how):
    right = part(results, "right")
    model = small_llama()
    model.load_state_dict(right[0]["weights"])
    size = DISPATCHED if how == "dispatched" else how if isinstance(how, int) else how[1]
    expected = over_examples(model, text_examples(size))
    for result in right:
        assert readings(result["evaluations"][how], "eval_") == pytest.approx(expected, rel=1e-5)
        assert readings(result["evaluations"][how], "eval_") == readings(right[0]["evaluations"][how], "eval_")


def test_a_hook_that_fails_on_one_rank_holds_nobody_up(results):
    failing = part(results, "failing")
    for rank, result in enumerate(failing):
        assert readings(result["hook"][-2]) == readings(failing[0]["hook"][-2])
        assert set(readings(result["hook"][-2])) == {"matrix_entropy/last"}
        assert any("Left out, since ranks failed" in text for text in result["warnings"]) == (rank != 1)
        assert any("Reading layer 'model.tap' failed" in text for text in result["warnings"]) == (rank == 1)


def test_a_probe_that_fails_on_one_rank_leaves_the_reading_of_the_others(results):
    failing = part(results, "failing")
    model = small_llama()
    model.load_state_dict(failing[0]["weights"])
    ids = [5, 3, 8, 2, 1]
    expected = over_examples(model, [{"input_ids": ids, "attention_mask": [1] * 5, "labels": ids}])
    for rank, result in enumerate(failing):
        read = [record for record in result["probe"] if "matrix_entropy/last" in record]
        assert [record["step"] for record in read] == [2, 4]
        assert read[-1]["matrix_entropy/last"] == pytest.approx(expected["matrix_entropy/last"], rel=1e-5)
        assert any("Monitoring failed: IndexError" in text for text in result["warnings"]) == (rank == 1)


def test_all_ranks_stop_at_the_same_step(results):
    failing = part(results, "failing")
    assert failing[0]["stopped"] < 20
    for result in failing:
        assert result["stopped"] == failing[0]["stopped"]
        assert result["trend"] == failing[0]["trend"]
