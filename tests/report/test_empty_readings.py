"""Readings that are NaN, of layers without a finite token, and records of a step that come in two."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from matent_callbacks.plot import layer_heatmap, layer_profile, training_overview
from matent_callbacks.report import comparison, page, read_run
from tests.wandb_history import read_history

NAN = math.nan
METRICS = ("effective_rank", "matrix_entropy", "spectrum_top_1", "spectrum_top_2", "rankme", "diff_erank")
Records = list[dict[str, Any]]


def history(*, apart: bool = False) -> Records:
    """Of `layer_01` no reading is a number, of `last` and `layer_02` a part is; `rankme`, the spectrum: none at all."""
    records: Records = []
    for step in range(1, 13):
        loss = {"step": step, "epoch": 0.1, "loss": 3 - 0.1 * step, "learning_rate": 1e-3}
        readings: dict[str, Any] = {"step": step, "epoch": 0.1, "alignment/image_text": NAN, "plateau/loss": NAN}
        for metric in METRICS:
            there = metric in METRICS[:2]
            readings |= {
                f"{metric}/layer_00": 2 + 0.1 * step if there else NAN,
                f"{metric}/layer_01": NAN,
                f"{metric}/layer_02": NAN if step < 4 or not there else 3.0,
                f"{metric}/last": NAN if step > 6 or not there else 3 + 0.1 * step,
            }
        readings["nonfinite_tokens/layer_01"] = NAN if step == 3 else 12.0
        readings["collapse/effective_rank/last"] = NAN if step == 2 else 0.0
        records += [readings, loss] if apart else [{**readings, **loss}]
        if step % 4 == 0:
            held_out = {"eval_loss": 2.0, "eval_effective_rank/last": NAN, "eval_effective_rank/layer_01": NAN}
            records.append({"step": step, **held_out})
    return records


def hugging_face(folder: Path, records: Records) -> Path:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 12, "log_history": records}))
    return folder


def lightning(folder: Path, records: Records) -> Path:
    names = {"loss": "train_loss"}
    rows = [{names.get(k, k).replace("eval_", "val_"): v for k, v in record.items()} for record in records]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def wandb_offline(folder: Path, records: Records) -> Path:
    import wandb

    with wandb.init(dir=str(folder), mode="offline") as run:
        for record in records:
            named = {k.replace("eval_", "eval/") if k[:5] == "eval_" else f"train/{k}": v for k, v in record.items()}
            run.log({**named, "train/global_step": record["step"]})
    read_history(folder)  # which waits until all is written
    return folder


LOGS = [hugging_face, lightning, wandb_offline]


def text_of(html: str) -> str:
    html = re.sub(r"<(svg|style|table).*?</\1>", " ", html, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("apart", [False, True])
def test_the_page_draws_what_is_there_and_says_what_is_not(
    log: Callable[[Path, Records], Path], apart: bool, tmp_path: Path, own_wandb: Path
) -> None:
    run = read_run(log(tmp_path, history(apart=apart)))
    assert run.steps == list(range(1, 13))
    assert not [note for note in run.notes if "more than once" in note]
    text = text_of(page(run))
    # Sentences and captions have the word NaN, never the number.
    assert "nan" not in text.replace("NaN", "")
    for told in (
        "Training loss fell from 2.9 at step 1 to 1.8 at step 12",
        "Effective rank of the last layer rose from 3.1 at step 1 to 3.6 at step 6, by 0.5. 6 of its 12 readings are",
        "Effective rank: no reading of layer_01 is a finite number; readings that are NaN or infinite: layer_02 (3 of",
        "Held-out effective rank of the last layer: no reading is a finite number (3 are not).",
        "RankMe of the last layer: no reading is a finite number (12 are not).",
        "Without a finite reading: layer_01.",
        "132 tokens that held NaN or Inf were left out",
    ):
        assert told in text, text
    titles = re.findall(r"<h[1-4][^>]*>(.*?)</h[1-4]>|<title[^>]*>(.*?)</title>", page(run))
    assert not [title for title in titles if "nan" in "".join(title).lower()]
    assert "Effective rank of every layer" in text
    assert "Spectrum of" not in text


def test_a_step_in_two_records_is_as_in_one(tmp_path: Path) -> None:
    pages = []
    for apart in (False, True):
        (tmp_path / str(apart) / "run").mkdir(parents=True)
        pages.append(page(read_run(hugging_face(tmp_path / str(apart) / "run", history(apart=apart)))))
    assert pages[0] == pages[1]
    drawn = []
    for apart in (False, True):
        figure = training_overview(history(apart=apart))
        drawn.append([[line.get_xydata().tolist() for line in ax.get_lines()] for ax in figure.axes])
        plt.close(figure)
    assert repr(drawn[0]) == repr(drawn[1])
    assert len(drawn[0][1][0]) == 12


def test_runs_side_by_side_are_compared_in_layers_that_were_read(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 4.0), ("b", NAN)):
        (tmp_path / name).mkdir()
        records = [{"step": s, "effective_rank/layer_00": 3.0, "effective_rank/last": value} for s in (1, 2)]
        runs.append(read_run(hugging_face(tmp_path / name, [{**r, "loss": 1.0} for r in records])))
    text = text_of(comparison(runs))
    assert "The last layer that was read: last, layer_00." in text
    assert "nan" not in text.replace("NaN", "")
    comparison([read_run(hugging_face(tmp_path / "a", history())), *runs])


@pytest.mark.parametrize("metric", ["effective_rank", "matrix_entropy"])
@pytest.mark.parametrize("values", [(NAN, NAN), (NAN, 0.0), (NAN, 2.0), (-math.inf, NAN)])
def test_pictures_of_layers_without_a_reading(metric: str, values: tuple[float, float]) -> None:
    records = [{"step": s, f"{metric}/layer_00": NAN, f"{metric}/last": value} for s, value in enumerate(values)]
    for draw in (layer_heatmap, layer_profile):
        figure, ax = plt.subplots(layout="constrained")
        draw(records, metric, ax=ax)
        figure.canvas.draw()
        assert [label.get_text() for label in (*ax.get_yticklabels(), *ax.get_xticklabels())].count("last") == 1
        plt.close(figure)
