"""Which ranks belong together: those of a process group, and nobody waits where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matent_callbacks import EntropyMonitor
from tests.distributed.groups_on_ranks import (
    METRICS,
    Stage,
    batch_of,
    in_a_pipeline,
    in_groups,
    read,
    train_unlike,
    unlike,
)
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("differs", ["layers", "metrics", "solver", "dtype"])
def test_ranks_that_read_other_things_have_no_reading_and_say_so_once(differs):
    told = {
        "layers": "layers on rank 0: layer_00, layer_01, last; layers on rank 1: layer_00, layer_01, layer_02, last.",
        "metrics": "metrics on rank 1: matrix_entropy, spectrum, rankme.",
        "solver": "solver on rank 0: exact; solver on rank 1: approximate.",
        "dtype": "dtype on rank 0: torch.float32; dtype on rank 1: torch.float64.",
    }
    for result in run_on_ranks(unlike, 2, differs, seconds=60):
        assert result["found"] == [{}, {}, {}]
        (warning,) = result["warnings"]
        assert told[differs] in warning
        assert "`process_group=`" in warning
        assert result["in step"] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(train_unlike, 2, str(tmp_path_factory.mktemp("ranks")), seconds=90)


def test_training_goes_on_where_ranks_read_other_layers(trained):
    for result in trained:
        assert not any("matrix_entropy" in key for record in result["unlike"]["log"] for key in record)
        (warning,) = result["unlike"]["warnings"]
        assert "layers on rank 0: last; layers on rank 1: layer_00, layer_01, last." in warning


def test_training_goes_on_where_a_collective_fails(trained):
    for result in trained:
        read_at = [record["step"] for record in result["failing"]["log"] if "matrix_entropy/last" in record]
        assert read_at == [4]
        (warning,) = result["failing"]["warnings"]
        assert "unhandled system error" in warning


@pytest.mark.parametrize("run", ["unlike", "failing"])
def test_and_is_the_same(trained, run):
    for result in trained:
        for name, value in result["plain"]["weights"].items():
            assert torch.equal(value, result[run]["weights"][name])


def test_the_numbers_of_a_group_are_those_of_one_process_over_its_tokens():
    results = run_on_ranks(in_groups, 4, seconds=60)
    for members in ([0, 2], [1, 3]):
        expected = read(members, depth=2 + members[0] % 2)
        assert len(expected) == (3 + members[0] % 2) * (5 + 4)  # four directions of the spectrum
        for rank in members:
            assert results[rank]["values"] == pytest.approx(expected, rel=1e-5)
            assert results[rank]["values"] == results[members[0]]["values"]
    for rank, result in enumerate(results):
        assert result["others"] == f"`process_group` must hold this rank, {rank}, got one of other ranks."
        assert result["name"] == "`process_group` must be None or a torch.distributed.ProcessGroup, got str."


def test_the_stages_of_a_pipeline_are_numbered_as_in_the_whole_model():
    model = Stage(range(4), 4)
    monitor = EntropyMonitor(model, "all", metrics=METRICS, dtype=torch.float64)
    with monitor:
        for data_rank in range(2):
            model(batch_of(data_rank))
    expected = monitor.compute()
    assert len(expected) == 5 * (5 + 4)
    for values in run_on_ranks(in_a_pipeline, 4, seconds=60):
        assert values == pytest.approx(expected, rel=1e-5)
