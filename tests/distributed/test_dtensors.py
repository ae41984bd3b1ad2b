"""Hidden states that are spread over a mesh of ranks in any way: the numbers of one process, each token once."""

from __future__ import annotations

import pytest

from tests.distributed.dtensors_on_ranks import (
    of_model,
    of_one_sequence,
    outside,
    read,
    sequence_parallel,
    spread,
    whole,
)
from tests.distributed.reading import small_llama
from tests.ranks import run_on_ranks

GATHERS = {"allgather_", "all_gather_into_tensor", "_allgather_base_", "all_gather_into_tensor_coalesced"}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_numbers_are_those_of_one_process(world_size):
    hidden, mask = whole()
    expected = read(hidden, mask)
    assert expected["nonfinite_tokens/0"] == 1
    results = run_on_ranks(spread, world_size, seconds=60)
    for result in results:
        of_one = result.pop("one sequence")["values"]
        assert of_one == pytest.approx(read(hidden[1], of_one_sequence()), rel=1e-9)
        assert len(result) == 5
        for way, found in result.items():
            assert found["values"] == pytest.approx(expected, rel=1e-9), way
            assert found["values"] == results[0][way]["values"]
            # No rank is sent all activations. Of an all-to-all, torch itself makes a gather on the CPU.
            assert "features" in way or not GATHERS & {name for name, _ in found["sent"]}, way
            # Where tokens lie whole, no activation is sent at all.
            if way in ("batch", "tokens", "everywhere", "batch, tokens", "tokens, tokens", "batch, everywhere"):
                assert {name for name, _ in found["sent"]} <= {"allreduce_", "reduce_"}, way


def test_tokens_that_are_with_ranks_outside_of_the_process_group_are_gathered():
    hidden, mask = whole()
    expected = read(hidden, mask)
    for values in run_on_ranks(outside, 3, seconds=60):
        assert values == pytest.approx(expected, rel=1e-9)


def test_a_model_of_transformers_with_sequence_parallelism():
    expected = of_model(small_llama().eval())
    for result in run_on_ranks(sequence_parallel, 2, seconds=60):
        assert result["warnings"] == []
        assert result["kinds"] == {"(Shard(dim=1),)"}
        for values, own in zip(result["values"], expected, strict=True):
            assert values == pytest.approx(own, rel=1e-4)
