"""The examples run as they are, with the flags that make them short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.versions import needs
from tests.wandb_history import read_history

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: object) -> str:
    return finished(script, *arguments).stdout


def finished(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    environment["OMP_NUM_THREADS"] = "1"  # the models are tiny
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    return path


def test_pretrain_text(tmp_path: Path, text: Path):
    output = tmp_path / "out"
    printed = run("pretrain_text.py", text, "--size", "small", "--steps", 5, "--every", 2, "--output", output)
    lines = [line.strip() for line in printed.splitlines() if "effective_rank: layer_00 " in line]
    assert [line.split()[1] for line in lines if " loss " in line] == ["2", "4"]
    # The last reading is of the model that is saved, at a step that the Trainer does not log.
    assert [line.split()[1] for line in lines if "loss" not in line] == ["5"]
    assert [line.split()[1] for line in lines if " eval_loss " in line] == ["1", "2", "3", "4", "5"]
    assert "matrix_entropy/" not in printed
    table = [line.split() for line in printed.splitlines() if line.startswith(("layer_", "last"))]
    assert [row[0] for row in table] == ["layer_00", "layer_01", "layer_02", "layer_03", "last"]
    for _, _, _, start, end, difference in table:
        assert abs(float(start) - float(end) - float(difference)) < 0.011
    assert (output / "overview.png").read_bytes().startswith(b"\x89PNG")
    steps = [row["train/global_step"] for row in read_history(output) if "train/effective_rank/last" in row]
    assert steps == [2, 4, 5]


def test_finetune_llm(tmp_path: Path, text: Path):
    output = tmp_path / "out"
    printed = run("finetune_llm.py", text, "--steps", 2, "--every", 1, "--output", output)
    table = [line.split() for line in printed.splitlines() if re.match(r"(layer_\d\d|last) +\d", line)]
    assert [row[0] for row in table] == [*(f"layer_{number:02d}" for number in range(30)), "last"]
    for layer, base, tuned, with_sinks, change in table:
        assert float(tuned) / float(base) - 1 == pytest.approx(float(change.rstrip("%")) / 100, abs=2e-3)
        if layer in ("layer_12", "layer_13", "layer_14"):
            assert float(with_sinks) < 10 < 50 < float(tuned)
    assert (output / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "trainer_state.json"} <= {file.name for file in output.iterdir()}


def test_pretrain_lightning(tmp_path: Path, text: Path):
    output = tmp_path / "out"
    printed = run("pretrain_lightning.py", text, "--steps", 4, "--every", 2, "--output", output)
    summary = printed.split("After 4 steps")[1].split("Curves:")[0].splitlines()[1:]
    assert [line.split()[0] for line in summary] == [
        "val_loss",
        "val_matrix_entropy/last",
        "val_effective_rank/last",
        "diff_erank/last",
    ]
    rows = read_history(output)
    assert [row["trainer/global_step"] for row in rows if "effective_rank/last" in row] == [1, 3]
    assert any("plateau/val_matrix_entropy/last" in row for row in rows)


@needs("transformers", "5.0")  # another beginning of the same run, which in 14 steps is told of nothing yet
def test_reading_the_curves(tmp_path: Path):
    done = finished("reading_the_curves.py", "--steps", 14, "--only", "collapse", "--alarm", "--output", tmp_path)
    assert next(tmp_path.rglob("*collapse*.png")).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"effective_rank/last: collapse at step 1\d, value [\d.]+: below [\d.]+ \(0.25 of 77", done.stderr)
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["0"], ["14"])]
    assert [len(row) for row in rows] == [7, 7]
    assert float(rows[1][5]) < float(rows[0][5]) / 4


def test_scenes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from scenes import CELL, JITTER, PLACES, THINGS, Scenes, glyphs, is_held_out, word_tokenizer

    assert set(glyphs()) == set(THINGS)
    assert len({glyph.tobytes() for glyph in glyphs().values()}) == len(THINGS)
    train, held_out = Scenes(4000, seed=0), Scenes(500, seed=0, held_out=True)
    seen, companies = set(), {False: set(), True: set()}
    for scenes in (train, held_out):
        for caption, picture in scenes:
            placed = [(part.split(" ", 1)[0], part.split(" ", 1)[1]) for part in caption.split(", ")]
            companies[scenes.held_out].add(frozenset(thing for thing, _ in placed))
            seen |= set(placed) if scenes is train else set()
            for place in PLACES:
                y, x = divmod(PLACES.index(place), 3)
                inside = picture[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
                core = inside[2 * JITTER : -2 * JITTER, 2 * JITTER : -2 * JITTER]
                assert (core < 255).any() == (place in dict(placed).values())
    assert len(seen) == len(THINGS) * len(PLACES)  # each thing at each place, in training
    assert not companies[False] & companies[True]
    assert not any(is_held_out(sorted(company)) for company in companies[False])
    assert all(
        (a.picture == b.picture).all() and a.caption == b.caption for a, b in zip(held_out, held_out, strict=True)
    )
    captions = [caption for caption, _ in held_out]
    tokenizer = word_tokenizer()
    ids = tokenizer([f"{caption}<end>" for caption in captions]).input_ids
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == captions


@needs("transformers", "5.0")
def test_finetune_vlm(tmp_path: Path):
    printed = run("finetune_vlm.py", "--steps", 4, "--tower-steps", 2, "--every", 2, "--output", tmp_path)
    for name in ("alignment.png", "captions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "Plateau of the grounding: none" in printed
    assert " of 64 held-out scenes are described without an error" in printed
    rows = [line.split() for line in printed.splitlines() if line.lstrip().startswith(("2 ", "4 "))]
    logged = [row for row in read_history(tmp_path) if "train/alignment/grounding" in row]
    assert [row["train/global_step"] for row in logged] == [2, 4]
    for row, values in zip(rows, logged, strict=True):
        assert float(row[2]) == pytest.approx(values["train/alignment/grounding"], abs=6e-4)
        assert float(row[3]) == pytest.approx(values["train/alignment/cka_z"], abs=0.06)
        assert 1 / 3 <= float(row[5]) <= 1
    assert all("train/effective_rank/vision_encoder" in row for row in logged)


def test_train_clip(tmp_path: Path):
    printed = run("train_clip.py", "--steps", 2, "--every", 1, "--output", tmp_path)
    for name in ("cka_z", "mutual_knn_z", "cka_debiased", "mutual_knn", "modality_gap"):
        assert f"alignment/{name}: " in printed
    assert [r["trainer/global_step"] for r in read_history(tmp_path) if "alignment/cka" in r] == [0, 1]


def test_scaling_law(tmp_path: Path):
    printed = run("scaling_law.py", "--quick", "--output", tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"]) == 3
    assert "The same fit to the models before training" in printed
    assert (tmp_path / "normalized_sequence_matrix_entropy.png").read_bytes().startswith(b"\x89PNG")
