"""Ranks that hold parts of the same sequences, as in context parallelism: the numbers of one process, all whole."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.split_on_ranks import batches, failing, in_context, read, refused
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("world_size", "small_pieces", "dtype"),
    [(2, False, torch.float32), (2, True, torch.float32), (2, True, torch.float64), (4, False, torch.float64)],
)
def test_the_numbers_are_those_of_whole_sequences(world_size, small_pieces, dtype):
    whole = read([batch for data_rank in range(world_size // 2) for batch in batches(data_rank)], dtype=torch.float64)
    assert 0 < whole["sink_tokens/0"] < 1
    # An Inf and a NaN in each batch; tanh leaves the NaN.
    assert (whole["nonfinite_tokens/0"], whole["nonfinite_tokens/1"]) == (3 * world_size, 3 * world_size // 2)
    # What is left of the centre of a few tokens 1,000 lengths away shows in float32 for `rankme`, also in one process.
    rel = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 5e-4)}[dtype]
    expected = {name: pytest.approx(value, rel=rel["rankme" in name]) for name, value in whole.items()}
    results = run_on_ranks(in_context, world_size, small_pieces, dtype, seconds=60)
    for values in results:
        assert values == expected
        assert values == results[0]


@pytest.mark.parametrize("fault", ["_sum_up", "pieces", "_add_up", "output", "mask", "batch", "open"])
def test_a_rank_that_fails_in_the_middle_holds_nobody_up(fault):
    first, second = run_on_ranks(failing, 2, fault, seconds=60)
    told = {"batch": "got 2 to 3 sequences of 12 to 12 features", "output": "must have shape"}
    for result, other in ((first, second), (second, first)):
        assert result["found"] == other["found"]
        assert result["in step"] == 2
    at_fault, after = second["found"]
    left = (
        set() if fault in ("mask", "batch", "open") else {"matrix_entropy/layer_00", "sequence_matrix_entropy/layer_00"}
    )
    assert set(at_fault) == set(after) == left
    assert any(told.get(fault, "out of memory") in text for text in second["warnings"])
    assert any(
        "failed to read" in text or "must have as many" in text or "ranks failed" in text for text in first["warnings"]
    )


def test_what_cannot_be_read_in_parts_is_refused():
    for rank, (packed, *_, group, curvature) in enumerate(run_on_ranks(refused, 2, seconds=60)):
        assert "failed" in packed
        assert ("a batch is packed" in packed) == (rank == 0)
        assert group == (
            f"`process_group` must hold all ranks of `context_group`, [0, 1], since their tokens belong "
            f"together, got [{rank}]."
        )
        assert (
            curvature == "`metrics` asks for 'curvature', which is of whole sequences, and there is a `context_group`."
        )
