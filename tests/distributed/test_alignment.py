"""Alignment over the probes of several ranks."""

from __future__ import annotations

from typing import Any

import pytest

from matent_callbacks import measure_alignment
from tests.pairs import collate_pairs, llava_examples, make_llava
from tests.ranks import run_on_ranks

MEASURES = ["mutual_information"]


def measured(first: int, count: int) -> dict[str, float]:
    return measure_alignment(make_llava(), collate_pairs(llava_examples(16)[first : first + count]))


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"values": measured(*[(0, 9), (9, 3)][rank])}
    probe = collate_pairs(llava_examples(8))
    if rank == 1:
        del probe["pixel_values"]
    try:
        measure_alignment(make_llava(), probe)
    except (ValueError, RuntimeError) as error:
        found["error"] = str(error)
    found["pairs"] = measure_alignment(
        make_llava(), collate_pairs(llava_examples(8)[4 * rank :][:4]), pair_measures=MEASURES
    )
    return found


def test_alignment_is_that_of_the_pairs_of_all_ranks_and_an_error_on_one_holds_nobody_up():
    first, second = run_on_ranks(on_rank, 2)
    assert first["values"] == second["values"] == pytest.approx(measured(0, 12), rel=1e-5)
    assert first["error"] == "Another rank failed to read the probe."
    assert "`pixel_values` must be in the batch" in second["error"]
    key = "alignment/mutual_information"
    own = [
        measure_alignment(make_llava(), collate_pairs(llava_examples(8)[4 * rank :][:4]), pair_measures=MEASURES)[key]
        for rank in range(2)
    ]
    assert own[0] != own[1]
    assert first["pairs"][key] == second["pairs"][key] == pytest.approx(sum(own) / 2, rel=1e-5)
