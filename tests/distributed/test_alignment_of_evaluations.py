"""Alignment of several evaluation sets in several processes."""

from __future__ import annotations

import pytest

from matent_callbacks import measure_alignment
from tests.distributed.evaluations_on_ranks import KEY, NUM_PAIRS, SETS, on_rank, on_rank_of_lightning
from tests.pairs import collate_pairs, make_clip
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("name", ["whole", "in parts"])
def test_pairs_that_are_not_found_on_one_rank_hold_nobody_up(found, name):
    first, last = (rank[name] for rank in found)
    of = {
        key: measure_alignment(make_clip(), collate_pairs(examples[:NUM_PAIRS]), k=4)[KEY]
        for key, examples in SETS.items()
    }
    expected = {KEY: of["x"], f"eval_x_{KEY}": of["x"], f"eval_z_{KEY}": of["z"]}
    assert first["values"] == last["values"] == pytest.approx(expected, abs=1e-5)
    assert len(first["told"]) == len(last["told"]) == 1
    assert "Another rank failed" in first["told"][0]
    assert "boom" in last["told"][0]
    # Of x and z once; those of y were found on one of the ranks, the other one tries again.
    assert (first["reads"], last["reads"]) == (3, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_on_ranks(on_rank, 2, str(tmp_path_factory.mktemp("ranks")))


def test_loaders_that_are_loaded_early_on_each_rank_hold_nobody_up(tmp_path):
    expected = measure_alignment(make_clip(), collate_pairs(SETS["x"][:NUM_PAIRS]), k=4)[KEY]
    for rank in run_on_ranks(on_rank_of_lightning, 2, str(tmp_path)):
        for more_calls, (without, watched) in enumerate(rank):
            assert watched[0] == without[0]
            assert watched[1] == without[1] + more_calls
            assert watched[2] == pytest.approx({KEY: expected, f"val_{KEY}": expected}, abs=1e-5)
