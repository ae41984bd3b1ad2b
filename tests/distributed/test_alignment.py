"""Alignment over the probes of several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matent_callbacks import measure_alignment
from matent_callbacks.accumulate.gathering import all_gather_ragged
from tests.distributed import alignment_in_parts
from tests.pairs import IMAGE_TOKEN, clip_examples, collate_pairs, llava_examples, make_clip, make_llava, seeing_llava
from tests.ranks import run_on_ranks
from tests.versions import needs

MEASURES = ["mutual_information", "mir", "mir_by_layer"]
# Pairs of each rank: different numbers, the next ones, none, and the first ones once more.
SPLITS = ((0, 9), (9, 3), None, (0, 9))
EXACT = {"rel": 1e-5, "abs": 1e-6}


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


@needs("transformers", "5.0")
def test_alignment_is_that_of_the_pairs_of_all_ranks_and_an_error_on_one_holds_nobody_up():
    first, second = run_on_ranks(on_rank, 2)
    expected = measured(0, 12)
    # Images are exchanged within the probe of a rank.
    within = {"alignment/grounding", "alignment/image_text_shift"}
    assert within < set(expected)
    assert first["values"] == second["values"]
    assert {k: v for k, v in first["values"].items() if k not in within} == pytest.approx(
        {k: v for k, v in expected.items() if k not in within}, **EXACT
    )
    assert first["error"] == "Another rank failed to read the probe."
    assert "`pixel_values` must be in the batch" in second["error"]
    together = measure_alignment(make_llava(), collate_pairs(llava_examples(8)), pair_measures=MEASURES)
    assert {"alignment/mutual_information", "alignment/mir", "alignment/mir/last"} < set(together)
    assert first["pairs"] == second["pairs"] == pytest.approx(together, **EXACT)


def probe_of(split: tuple[int, int] | None) -> list[dict[str, Any]]:
    """With a sample of text only in each, and labels."""
    if split is None:
        return []
    start, count = split
    batch = collate_pairs(llava_examples(16)[start : start + count])
    batch["input_ids"][-1] = batch["input_ids"][-1].where(batch["input_ids"][-1] != IMAGE_TOKEN, 5)
    return [{**batch, "pixel_values": batch["pixel_values"][:-1]}]


def of_unequal_ranks(rank: int, world_size: int) -> dict[str, Any]:
    split = SPLITS[rank]
    examples = [] if split is None else clip_examples(16)[split[0] : sum(split)]
    return {
        "llava": measure_alignment(seeing_llava(), probe_of(split), k=4),
        "mir": measure_alignment(seeing_llava(), probe_of(split), pair_measures=["mir"]),
        "clip": measure_alignment(make_clip(), [collate_pairs(examples)] if examples else [], k=4),
    }


@needs("transformers", "5.0")
def test_ranks_with_other_numbers_of_pairs_none_and_the_same_once_more():
    found = run_on_ranks(of_unequal_ranks, len(SPLITS))
    assert all(rank["llava"] == found[0]["llava"] for rank in found)
    assert all(rank["clip"] == found[0]["clip"] for rank in found)
    whole = [batch for split in SPLITS[:2] for batch in probe_of(split)]
    expected = measure_alignment(seeing_llava(), whole, k=4)
    assert expected["alignment/skipped_text_only"] == 2
    assert abs(expected["alignment/grounding"]) > 1e-3
    assert {"alignment/cka_z", "alignment/mutual_knn_z", "alignment/cka_debiased"} < set(expected)
    assert found[0]["llava"] == pytest.approx(expected, **EXACT)
    mir = measure_alignment(seeing_llava(), whole, pair_measures=["mir"])
    assert all(rank["mir"] == pytest.approx(mir, **EXACT) for rank in found)
    clip = measure_alignment(make_clip(), collate_pairs(clip_examples(12)), k=4)
    assert found[0]["clip"] == pytest.approx(clip, **EXACT)


def gathered(rank: int, world_size: int) -> list[Any]:
    rows = [torch.ones(2, 3), torch.zeros(0, 0), 2 * torch.ones(1, 3, dtype=torch.float64)][rank]
    found: list[Any] = [all_gather_ragged(rows), all_gather_ragged(torch.zeros(0, 0))]
    with pytest.raises(ValueError, match="as many features on every rank"):
        all_gather_ragged(torch.ones(1 + rank, 3 + rank % 2))
    return found


def test_rows_of_every_rank_on_every_rank():
    for parts, empty in run_on_ranks(gathered, 3):
        assert [part.shape for part in parts] == [(2, 3), (0, 3), (1, 3)]
        assert {part.dtype for part in parts} == {torch.float64}
        assert torch.cat(parts).tolist() == [[1.0] * 3] * 2 + [[2.0] * 3]
        assert len(empty) == 3
        assert not any(len(part) for part in empty)


def too_few(rank: int, world_size: int) -> list[str]:
    """Of two ranks with two pairs each, one measure that needs five."""
    told = []
    for pair_measures in (["mutual_knn"], ["cka_debiased"]):
        try:
            values = measure_alignment(
                make_clip(), collate_pairs(clip_examples(4)[2 * rank :][:2]), k=4, pair_measures=pair_measures
            )
            told.append(sorted(key for key in values if key.startswith("alignment")))
        except ValueError as error:
            told.append(str(error))
    return told


def test_pairs_of_all_ranks_are_counted():
    first, second = run_on_ranks(too_few, 2)
    assert first == second
    assert first == ["`probe` must hold at least 5 pairs for mutual_knn (k=4), got 4.", ["alignment/cka_debiased"]]


@needs("transformers", "5.0")
def test_a_language_model_that_holds_parts_of_sequences_gives_the_values_of_whole_ones():
    for found in run_on_ranks(alignment_in_parts.on_rank, 2):
        assert {"alignment/grounding", "alignment/cka_z", "effective_rank/image_text"} < set(found["alone"])
        assert found["values"] == pytest.approx(found["alone"], **EXACT)
        assert max(found["lengths"]) < alignment_in_parts.probe()["input_ids"].shape[1]
        told = "`probe` must be the same on all ranks of `context_group`, got unlike batches."
        assert found["other"] == found["none"] == told
