"""A failure on one rank leaves no other waiting, and all train as without the callback."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_on_ranks
from tests.sweep.faults_on_ranks import on_rank
from tests.sweep.runs import FRAMEWORKS

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture(scope="module", params=[0, 1], ids=lambda rank: f"on rank {rank}")
def results(request: Any, tmp_path_factory: Any) -> tuple[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return request.param, run_on_ranks(on_rank, 2, str(folder), request.param, seconds=240)


@BOTH
def test_all_ranks_train_on_as_without_the_callback(framework, results):
    failing, ranks = results
    steps, weights = ranks[0][framework]["alone"]
    assert steps == 4
    for rank, result in enumerate(ranks):
        for name, (made, trained, told) in result[framework]["places"].items():
            assert (made, trained) == (steps, weights), name
            assert (told > 0) == (rank == failing), name


@BOTH
def test_alignment_is_given_up_together(framework, results):
    _, ranks = results
    for result in ranks:
        *trained, told = result[framework]["alignment"]["later"]
        assert tuple(trained) == result[framework]["alone"]
        assert told


@BOTH
def test_a_probe_that_one_rank_does_not_find_is_told_on_all_when_training_begins(framework, results):
    failing, ranks = results
    told = {rank: result[framework]["alignment"]["at start"] for rank, result in enumerate(ranks)}
    assert told == {failing: "boom", 1 - failing: "Another rank failed to read the probe."}


def test_a_rank_that_cannot_observe_stops_with_the_others(results):
    _, ranks = results
    stopped = {result["Lightning"]["stopped"] for result in ranks}
    assert len(stopped) == 1
    assert max(stopped) < 16
