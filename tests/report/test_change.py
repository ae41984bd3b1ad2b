"""What moved, of 31 layers: the pictures of change and of drift, and on what it was measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matent_callbacks.accumulate.catalogue import measured_settings
from matent_callbacks.report import Run, comparison, page, read_run
from matent_callbacks.report._comparison import labels, quantities
from matent_callbacks.report._comparison import pictures as pictures_of_runs
from matent_callbacks.report._figures import pictures
from tests.report.browser import BOTH_SCHEMES, BOTH_WIDTHS, BOXES, CONTRAST, assert_fits
from tests.report.conftest import Logged

NAMES = [*(f"layer_{i:02d}" for i in range(30)), "last"]
PROBE = measured_settings({"": "a probe"})
TRAINING = measured_settings({"": "training batches"})


def made(name: str = "run", prefix: str = "", **changes: Any) -> Run:
    """Layer 3 loses half of its rank, and layer 20 doubles it, which is less than the last one gains in dimensions."""
    ends = {"layer_03": 0.5, "layer_20": 2.0, "last": 1.25}
    records = []
    for step in range(0, 50, 5):
        values = {"step": step, "loss": 3.0 - step / 50}
        for i, layer in enumerate(NAMES):
            first = 400.0 if layer == "last" else 20.0 + i
            values[f"{prefix}effective_rank/{layer}"] = first * ends.get(layer, 1.0) ** (step / 45)
            values[f"{prefix}drift/{layer}"] = 0.01 * i * step / 45
        records.append(values)
    return Run(name, "by hand", records, **changes)


def test_change_and_drift_of_thirty_one_layers() -> None:
    found = {picture.name: picture for group in pictures(made(settings=PROBE)).values() for picture in group}
    assert list(found) == ["loss", "effective_rank", "heatmap", "change", "drift-by-depth", "drift"]
    change = found["change"]
    assert change.title == "Effective rank: change since the first measurement"
    assert change.wide
    assert change.caption.startswith("Each value over its layer's first: grey no change, blue less, orange more.")
    assert change.caption.endswith("Measured on a probe.")
    rows = {row[0]: row[1:] for row in change.rows}
    assert list(rows) == ["last layer", *NAMES[-2::-1]]
    assert set(rows["layer_00"]) == {"1"}
    assert [rows[n][-1] for n in ("layer_03", "layer_20", "last layer")] == ["0.5", "2", "1.25"]
    assert {"0.5", "0.707", "1", "1.41", "2"} & set(re.findall(r">([\d.]+)</text>", change.svg)) >= {"0.5", "1", "2"}
    drift = found["drift-by-depth"]
    assert drift.columns[-1] == "step 45"
    assert drift.rows[0][-1] == "0.3"
    assert ">last</text>" in drift.svg
    assert re.findall(r">(step \d+)<", drift.svg) == ["step 0", "step 15", "step 30", "step 45"]
    assert "Drawn are 4 of 10 readings, evenly spaced." in drift.caption
    # Those that moved most in the measure of the heat map: the ratio.
    assert found["effective_rank"].columns == ["step", "layer_00", "layer_03", "layer_20", "last layer"]


def test_of_a_metric_that_is_no_rank_the_differences_are_told() -> None:
    run = made()
    renamed = [{key.replace("effective_rank", "matrix_entropy"): v for key, v in r.items()} for r in run.records]
    found = {p.name: p for group in pictures(replace(run, records=renamed)).values() for p in group}
    assert found["change"].rows[0][-1] == "100"
    assert "Each value minus its layer's first" in found["change"].caption


def test_where_nothing_changes_or_there_is_one_reading_there_is_no_picture_of_change() -> None:
    run = made()
    still = [{**run.records[0], "step": record["step"]} for record in run.records]
    for records in (run.records[:1], still):
        (group,) = (pictures(replace(run, records=records))["Layer by layer"],)
        assert [picture.name for picture in group] == ["heatmap", "drift-by-depth"]


@BOTH_WIDTHS
@BOTH_SCHEMES
def test_thirty_one_layers_fit(opened: Callable[..., Any], width: int, scheme: str) -> None:
    tab = opened(page(made(settings=PROBE)), width=width, scheme=scheme)
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == 6
    for box in boxes:
        assert_fits(box, width)
    contrast = tab.evaluate(CONTRAST)
    assert contrast["text"] >= 7
    assert contrast["lines"] >= 3.5
    # Labels that are neither slanted nor upright lie apart.
    touching = tab.evaluate(
        """() => [...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility()).flatMap(svg => {
             const texts = [...svg.querySelectorAll('text')].filter(t => Math.abs(t.getCTM().b) < 1e-6)
               .map(t => [t.textContent, t.getBoundingClientRect()]);
             return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
               p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 4 && q.top < p.bottom - 4)
               .map(([b]) => `${a} on ${b}`)); })"""
    )
    assert touching == []
    titles = tab.evaluate("[...document.querySelectorAll('figure h3')].map(h => h.textContent)")
    assert len(titles) == 6
    assert all(titles)


def test_what_was_measured_is_in_each_log_once(stopped: Logged, resumed: Path) -> None:
    for folder in (stopped.folder, stopped.wandb, stopped.tensorboard, resumed / "csv", resumed / "tensorboard"):
        run = read_run(folder)
        assert run.measured == "training batches", folder
        assert run.named("other").measured == ""


def test_probe_and_training_batches_are_marked_side_by_side() -> None:
    runs = [made("a", settings=PROBE), made("b", settings=TRAINING), made("c")]
    by_name = {p.name: p for p in pictures_of_runs(runs, labels(runs), quantities(runs))}
    told = ["a (on a probe)", "b (on training batches)", "c (data not in its log)"]
    assert list(by_name["loss"].runs.values()) == ["a", "b", "c"]
    for name in ("effective_rank", "profile"):
        assert list(by_name[name].runs.values()) == told
        assert "Not all on the same data, as far as the logs say: see the legend." in by_name[name].caption
    html = comparison(runs)
    for label in told:
        assert html.count(f"{label}</span>") == 2
        assert html.count(f"{label}</td>") == 1


def test_runs_that_were_measured_alike_are_not_marked() -> None:
    for settings, caption in ((PROBE, "Measured on a probe."), ({}, "")):
        runs = [made("a", settings=settings), made("b", settings=settings)]
        by_name = {p.name: p for p in pictures_of_runs(runs, labels(runs), quantities(runs))}
        assert by_name["effective_rank"].caption == caption
        assert list(by_name["effective_rank"].runs.values()) == ["a", "b"]


def test_each_name_has_its_own_mark() -> None:
    settings = measured_settings({"english": "a probe, tokens with labels"})
    run = made(prefix="english/", settings=settings)
    (group,) = (pictures(run)["Readings named english"],)
    assert [p.name for p in group if p.name.endswith(("change", "depth"))] == [
        "named-0-change",
        "named-0-drift-by-depth",
    ]
    assert all("Measured on a probe, tokens with labels." in p.caption for p in group)


def test_evaluations_are_no_readings_of_a_probe() -> None:
    run = made()
    records = [{k if k == "step" else f"eval_{k}": v for k, v in r.items()} for r in run.records]
    for picture in pictures(replace(run, records=records, settings=PROBE))["Layer by layer"]:
        assert "Data: held out." in picture.caption
        assert "probe" not in picture.caption
