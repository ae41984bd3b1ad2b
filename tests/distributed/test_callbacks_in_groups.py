"""Callbacks read over the ranks of a group: the one they are given, or that of the model's device mesh."""

from __future__ import annotations

from typing import Any

import pytest

from matent_callbacks import measure_alignment
from tests.distributed.callbacks_on_ranks import on_rank
from tests.distributed.reading import layer_names, pooled
from tests.pairs import make_clip
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, 4, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize(("how", "groups"), [("by mesh", [[0, 2], [1, 3]]), ("given", [[0], [1], [2], [3]])])
def test_a_training_step_is_read_over_the_ranks_of_the_group(results, how, groups):
    for members in groups:
        runs = [results[rank][how] for rank in members]
        assert [record["step"] for record in runs[0]["log"]] == [1, 2]
        for step, record in enumerate(runs[0]["log"]):
            assert all(run["log"][step] == record for run in runs)
            states = [run["seen"][step] for run in runs]
            for i, name in enumerate(layer_names(3)):
                expected = pooled((hidden[i], mask) for hidden, mask in states)
                assert record[f"matrix_entropy/{name}"] == pytest.approx(expected, rel=1e-5)


def test_alignment_is_of_the_pairs_of_the_group(results):
    for result in results:
        alone = measure_alignment(make_clip(), result["pairs"], pair_measures=["cka"])
        assert result["alignment"] == pytest.approx(alone, rel=1e-5)
    assert len({result["alignment"]["alignment/cka"] for result in results}) == 4
