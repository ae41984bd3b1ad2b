"""Loops on two ranks: with accelerate and accumulation, with Fabric, and with FSDP2 and compiled blocks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.reading import layer_names, pooled
from tests.loop.on_ranks import EVERY, STEPS, on_rank
from tests.ranks import run_on_ranks

NAMES = layer_names(3)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, 2, seconds=300)


def of(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    if kind not in results[0]:
        pytest.skip("needs a torch whose FSDP2 runs on the CPU, which 2.6 is not")
    for result in results:
        watched, alone = result[kind]["watched"], result[kind]["alone"]
        assert watched["weights"].keys() == alone["weights"].keys()
        assert all(torch.equal(watched["weights"][name], alone["weights"][name]) for name in alone["weights"])
        assert not alone["logged"]
    return [result[kind]["watched"] for result in results]


def assert_right(logged: Any, runs: list[dict[str, Any]], *, micro_batches: int = 1, rel: float = 1e-5) -> None:
    """Each record is over the tokens of all micro-batches of its step, of both ranks."""
    assert [step for step, _ in logged] == list(range(EVERY, STEPS + 1, EVERY))
    for step, values in logged:
        forwards = [run["seen"][micro_batches * (step - 1) + i] for run in runs for i in range(micro_batches)]
        for index, name in enumerate(NAMES):
            expected = pooled((states[index], mask) for states, mask in forwards)
            assert values[f"matrix_entropy/{name}"] == pytest.approx(expected, rel=rel)


def test_accelerate(results):
    runs = of(results, "accelerate")
    *steps, evaluation = runs[0]["logged"]
    assert_right(steps, runs, micro_batches=2)
    assert {"matrix_entropy/model.layers.0.mlp", "matrix_entropy/model.layers.1.mlp"} <= steps[0][1].keys()
    assert evaluation[0] == STEPS
    assert evaluation[1].keys() == {f"eval_{key}" for key in steps[0][1]}
    # The trackers of accelerate are the main process's.
    assert runs[1]["logged"] == []


def test_fabric(results):
    runs = of(results, "fabric")
    forwards = [record for record in runs[0]["logged"] if "matrix_entropy/last" in record[1]]
    probes = [record for record in runs[0]["logged"] if "probe/matrix_entropy/last" in record[1]]
    assert_right(forwards, runs, rel=1e-4)
    assert {"matrix_entropy/model.layers.0.mlp", "matrix_entropy/model.layers.1.mlp"} <= forwards[0][1].keys()
    assert [step for step, _ in probes] == [2, 4]
    assert all(values["probe/diff_erank/last"] != 0 for _, values in probes)
    assert runs[1]["logged"] == runs[0]["logged"]


def test_compiled_blocks_that_are_sharded(results):
    runs = of(results, "torchtitan")
    for run in runs:
        assert_right(run["logged"], runs, micro_batches=2)
    assert runs[0]["logged"] == runs[1]["logged"]
