"""Runs side by side: which numbers, marks and settings the page has of which run."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks.report import Run, Stop, comparison, read_run
from matent_callbacks.report._comparison import first_at_best, labels, line_style, pictures, quantities
from matent_callbacks.report._settings import differing, flat
from tests.report.conftest import Logged


def made(name: str, **changes: Any) -> Run:
    """A run of three layers whose loss falls and whose rank falls over two decades."""
    scale = changes.pop("scale", 1.0)
    records: list[dict[str, float]] = [
        {
            "step": s,
            "loss": scale * (1 + 4 / s),
            "matrix_entropy/last": math.log(200 / s),
            **{f"effective_rank/layer_{i:02d}": 100.0 + i for i in range(2)},
            "effective_rank/last": 200 / s,
        }
        for s in range(1, 101)
    ]
    return Run(name, "by hand", records, **changes)


def rows(html: str) -> list[list[str]]:
    """The cells of every row of every table, as text."""
    found = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", "", c).strip() for c in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)] for row in found
    ]


def test_each_run_is_compared_with_the_best_loss_of_the_first() -> None:
    runs = [made("a", scale=1.0), made("b", scale=0.5), made("c", scale=2.0)]
    best, at = first_at_best(quantities(runs)[0].curves) or (None, None)
    assert best == 1.04
    # 0.5 (1 + 4 / s) <= 1.04 from s = 3.7 on.
    assert at == [100, 4, None]
    table = rows(comparison(runs))
    assert ["a", "1.04", "1.04", "100", "5", "1", "100"] in table
    assert ["b", "0.52", "0.52", "100", "2.5", "1", "4"] in table
    assert ["c", "2.08", "2.08", "100", "10", "1", "never"] in table
    assert ["Training loss", "at or below 1.04"] in table
    assert ["a", "2", "2", "100", "200", "1", ""] in table  # the effective rank


def test_a_run_has_its_colour_in_every_picture_whatever_is_drawn_in_it() -> None:
    without = made("without")
    without = replace(without, records=[{k: v for k, v in r.items() if k in ("step", "loss")} for r in without.records])
    runs = [made("a"), without, made("c")]
    by_name = {p.name: p for p in pictures(runs, labels(runs), quantities(runs))}
    assert list(by_name) == ["loss", "matrix_entropy", "effective_rank", "profile"]
    assert [list(p.runs) for p in by_name.values()] == [[0, 1, 2], [0, 2], [0, 2], [0, 2]]
    assert "Not in the log of without." in by_name["effective_rank"].caption
    for picture in by_name.values():
        for i in picture.runs:
            (group,) = re.findall(rf'<g id="{picture.name}-run{i}">(.*?)</g>', picture.svg, flags=re.DOTALL)
            assert f"stroke: var(--{('blue', 'orange', 'five-3')[i]})" in group
            assert f"<title>{runs[i].name}</title>" in group
    assert len({line_style(i) for i in range(12)}) == 12


def test_ranks_over_a_decade_are_on_a_logarithmic_axis() -> None:
    runs = [made("a"), made("b")]
    by_name = {p.name: p for p in pictures(runs, labels(runs), quantities(runs))}
    text = {name: re.findall(r">([\d.]+)</text>", picture.svg) for name, picture in by_name.items()}
    assert {"2", "5", "10", "20", "50", "100", "200"} <= set(text["effective_rank"])
    assert "500" not in text["loss"]
    # At step 100 the last layer has 2 dimensions.
    assert by_name["profile"].rows[0] == ["last layer", "2", "2"]
    assert by_name["profile"].caption == "At step 100."


def test_marks_are_those_of_the_logs_and_named() -> None:
    records = [dict(record) for record in made("a").records]
    records[39]["collapse/effective_rank/last"] = 1.0
    records[49]["collapse/effective_rank/layer_00"] = 1.0
    records[10]["collapse/effective_rank/last"] = 0.0
    runs = [replace(made("a"), records=records), replace(made("b"), stop=Stop(70, "loss", "why"))]
    assert runs[0].alarms == {"effective_rank/last": [40], "effective_rank/layer_00": [50]}
    loss, *_ = pictures(runs, ["a", "b"], quantities(runs))
    assert loss.caption == (
        "Marked: a, collapse at step 40 to 50 (effective_rank/last, effective_rank/layer_00), dotted; "
        "b, plateau at step 70, dashed."
    )
    unmarked, *_ = pictures([made("a"), made("b")], ["a", "b"], quantities(runs))
    vertical = r"stroke-dasharray: [\d., ]+; stroke-dashoffset: 0; stroke: var\(--{}\)"
    for colour, count in (("blue", 2), ("orange", 1)):
        assert len(re.findall(vertical.format(colour), loss.svg)) == count
        assert len(re.findall(vertical.format(colour), unmarked.svg)) == 0


def test_models_of_different_depth_share_an_axis_and_other_names_a_place() -> None:
    deep = [{"step": 1, "loss": 1.0, **{f"effective_rank/layer_{i:02d}": 3.0 for i in range(8)}}]
    runs = [made("a"), Run("deep", "by hand", deep)]
    profile = {p.name: p for p in pictures(runs, labels(runs), quantities(runs))}["profile"]
    assert "depth: 0 the first layer, 1 the last" in profile.svg
    assert profile.caption == "At each run's last reading."
    assert profile.columns == ["layer", "a, step 100", "deep, step 1"]
    rank = next(q for q in quantities(runs) if q.ranks)
    assert "The last layer that was read: last, layer_07." in rank.about


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "logs", tmp_path / "b" / "logs", None]
    runs = [replace(made("same"), path=path) for path in paths]
    assert labels([*runs, made("other")]) == ["same (a/logs)", "same (b/logs)", "same (3)", "other"]


def test_more_than_twelve() -> None:
    html = comparison([made(f"run {i}") for i in range(14)])
    assert "<h1>14 runs side by side</h1>" in html
    assert "Shown are the first 12; left out: run 12, run 13." in html
    assert html.count("<strong>run ") == 12
    with pytest.raises(ValueError, match="`runs` must be at least two runs, got 1"):
        comparison([made("a")])
    with pytest.raises(ValueError, match="'empty' has none"):
        comparison([made("a"), Run("empty", "by hand", [])])


def test_settings_of_a_real_run_from_each_log(stopped: Logged) -> None:
    expected = {"learning_rate": "0.001", "max_steps": "40", "seed": "3", "lr_scheduler_type": "linear"}
    for folder in (stopped.folder, stopped.wandb, stopped.tensorboard):
        settings = read_run(folder).settings
        assert {name: settings.get(name) for name in expected} == expected, folder
        assert settings["text_config.hidden_size"] == "24"
        assert not {"output_dir", "run_name", "hub_token"} & settings.keys()
    state = json.loads((stopped.folder / "checkpoint-6" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["matent_callbacks.settings"]
    assert "output_dir" not in kept
    assert not any("token" in str(value).lower() for value in kept.values())
    assert len(json.dumps(kept)) < 6000
    assert differing([read_run(stopped.wandb), read_run(stopped.wandb)]) == {}


def test_settings_that_differ_are_shown_and_no_others(stopped: Logged, tmp_path: Path) -> None:
    for name in ("1", "2"):
        shutil.copytree(stopped.wandb, tmp_path / name)
        (tmp_path / name / "files").mkdir(exist_ok=True)
        (tmp_path / name / "files" / "config.yaml").write_text(f"wandb_version: 1\nmixture:\n  value: {name}\n")
    shutil.copytree(stopped.folder / "checkpoint-6", tmp_path / "3" / "checkpoint-6")
    runs = [read_run(tmp_path / name) for name in ("1", "2", "3")]
    different = differing(runs)
    assert different.pop("mixture") == ["1", "2", None]
    # What a model is told of only when it is saved.
    assert different.keys() <= {"architectures", "dtype"}
    html = comparison(runs)
    assert ["mixture", "1", "2", "not known"] in rows(html)
    assert "nothing to compare" in comparison([made("a"), made("b")])
    same = [replace(made(name), settings={"seed": "1"}) for name in "ab"]
    assert "All settings that the logs know are the same. The logs of c know none." in comparison([*same, made("c")])


def test_settings_keep_no_secret() -> None:
    settings = {"hub_token": "hf_1", "wandb": {"api_key": "k", "entity": "e"}, "bos_token_id": 1, "lr": 1e-5, "x": [1]}
    assert flat(settings) == {"wandb.entity": "e", "bos_token_id": "1", "lr": "1e-05", "x": "[1]"}


def test_numbers_written_differently_are_the_same_setting() -> None:
    ours = replace(made("a"), settings=flat({"lr": 0.001, "warmup": 5, "nested": {"deep": True}}))
    theirs = replace(made("b"), settings=flat(json.loads('{"lr": 1e-3, "warmup": 5.0, "nested": {"deep": true}}')))
    assert differing([ours, theirs]) == {}
