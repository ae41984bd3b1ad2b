"""A probe of pairs is one series, at training steps and at evaluations, and nothing calls it held out."""

from __future__ import annotations

import math
from typing import Any

from matent_callbacks.report import Run, comparison, page, read_run
from matent_callbacks.report._figures import pictures
from matent_callbacks.report._findings import summary
from tests.report.conftest import Logged


def drawn(run: Run) -> dict[str, Any]:
    return {picture.name: picture for group in pictures(run).values() for picture in group}


def made(evaluated: dict[str, dict[int, float]]) -> Run:
    """Training steps log 10, 20, ...; ``evaluated``: by its prefix what evaluations log."""
    records: dict[int, dict[str, float]] = {}
    for step in (10, 20, 30, 40):
        values = {"alignment/grounding": step / 10, "alignment/mutual_knn": 0.0, "effective_rank/vision_encoder": 2.0}
        records[step] = {"step": step, **values}
    for prefix, values in evaluated.items():
        for step, value in values.items():
            found = {f"{prefix}alignment/grounding": value, f"{prefix}alignment/mutual_knn": 0.0}
            records.setdefault(step, {"step": step}).update(found)
    return Run("run", "by hand", [records[step] for step in sorted(records)])


def test_the_probe_of_a_real_run_is_one_series(stopped: Logged) -> None:
    run = read_run(stopped.folder)
    assert {"alignment/grounding", "eval_alignment/grounding"} < run.columns.keys()
    found = drawn(run)
    expected = {**dict(zip(*run.columns["eval_alignment/grounding"], strict=True))}
    expected.update(zip(*run.columns["alignment/grounding"], strict=True))
    picture = found["alignment-grounding"]
    assert picture.columns == ["step", "probe of pairs"]
    assert [float(row[0]) for row in picture.rows] == sorted(expected)
    assert found["stages-effective_rank"].caption == "Data: probe of pairs."
    said = [*summary(run)["Image and text"], *summary(run)["Stages"]]
    assert said
    assert all(", probe of pairs, " in sentence and "eld" not in sentence for sentence in said)


def test_readings_at_evaluations_that_equal_those_of_the_same_steps_are_of_the_same_pairs() -> None:
    picture = drawn(made({"eval_": {20: 2.0, 35: 3.25, 40: 4.0}}))["alignment-grounding"]
    assert picture.columns == ["step", "probe of pairs"]
    assert [row[1] for row in picture.rows] == ["1", "2", "3", "3.25", "4"]
    assert not picture.caption
    # One zero in common is not enough where another quantity differs, nor is it where no step has both.
    for values, names in (
        ({"eval_": {20: 2.5, 40: 4.0}}, ["probe of pairs", "pairs at evaluations"]),
        ({"eval_": {25: 2.5}}, ["probe of pairs", "pairs at evaluations"]),
        ({"eval_": {20: math.nan}}, ["probe of pairs"]),
        ({"eval_a_": {20: 2.0}, "eval_b_": {20: 7.0}}, ["probe of pairs", "pairs at evaluations (b)"]),
        ({"eval_a_": {25: 6.0}, "eval_b_": {25: 6.0}}, ["probe of pairs", "pairs at evaluations (a, b)"]),
    ):
        picture = drawn(made(values))["alignment-grounding"]
        assert picture.columns == ["step", *names]
        assert bool(picture.caption) == (len(names) > 1)


def test_no_page_calls_pairs_training_or_held_out() -> None:
    runs = [made({"eval_": {20: 2.0, 40: 4.0}}), made({"eval_": {20: 2.5, 40: 4.5}})]
    for run in runs:
        del run.records[0]["alignment/mutual_knn"]
    only = Run("c", "by hand", [{"step": s, "eval_alignment/grounding": 1.0 * s} for s in (1, 2)])
    for html in (*(page(run) for run in (*runs, only)), comparison(runs), comparison([only, only])):
        words = html[html.index("<main") :].lower()
        words = words.replace("held-out loss, ", "").replace("training loss, ", "")  # that are not in the log
        assert "held" not in words, words[words.index("held") - 80 :][:200]
        assert ">training<" not in words
    assert "Grounding (nats per token that the right image saves), pairs at evaluations, rose" in page(only)
