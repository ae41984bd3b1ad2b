"""``matent scaling`` on files as ``matent measure`` writes them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from matent_callbacks.cli.scaling import scaling

ENTROPY = "normalized_sequence_matrix_entropy"
SIZES = [98_000, 210_000, 390_000, 790_000, 1_570_000, 3_300_000, 5_800_000]


def model(size: int, value: float, name: str | None = None, **fields: Any) -> dict[str, Any]:
    values = {ENTROPY: {"value": value, "low": value - 0.01, "high": value + 0.01}, "diff_erank": {"value": 3.0}}
    entry = {"model": name or f"runs/llama-{size}", "parameters": size, "steps": None, "tokens": None}
    return {**entry, "layers": {"last": values}, **fields}


def falling(count: int = 7) -> list[dict[str, Any]]:
    noise = random.Random(0)
    return [model(size, 2 * size**-0.1 + noise.gauss(0, 0.003)) for size in SIZES[:count]]


@pytest.fixture
def write(tmp_path: Path):
    def write(models: Any, name: str = "results.json", **fields: Any) -> Path:
        document = {"format": "matent-measure", "version": 1, "settings": {}, "models": models}
        (tmp_path / name).write_text(json.dumps({**document, **fields}), encoding="utf-8")
        return tmp_path / name

    return write


def run(*arguments: object) -> Result:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(scaling)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rows(result: Result, start: str) -> list[list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return [row for row in table if row[0].startswith(start)]


def test_table_and_picture(write, tmp_path: Path):
    picture = tmp_path / "law.png"
    result = run(write(falling()), "--plot", picture)
    assert (result.exit_code, result.stderr) == (0, "")
    table = rows(result, "runs/")
    assert [row[1] for row in table] == [f"{size:,}" for size in SIZES]
    for _, _, value, interval, curve, off in table:
        assert interval == f"{float(value) - 0.01:.4f} to {float(value) + 0.01:.4f}"
        assert float(value) - float(curve) == pytest.approx(float(off), abs=1.1e-4)
    forms = rows(result, "a N^-b")
    assert [form[0] for form in forms] == ["a N^-b", "a N^-b + c"]
    assert float(forms[0][5]) < float(forms[1][5])
    value, low, _, high = forms[0][2].replace("(", "").replace(")", "").split()
    assert float(low) < float(value) < float(high)
    assert float(value) == pytest.approx(0.1, abs=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sizes_of_a_run(write):
    values = enumerate((0.9, 0.8, 0.7, 0.65))
    models = [model(5, value, f"checkpoint-{i}", steps=100 * i, tokens=1000 * (i + 1)) for i, value in values]
    by_tokens = run(write(models), "--x", "tokens")
    assert by_tokens.exit_code == 0
    assert [row[1] for row in rows(by_tokens, "checkpoint")] == ["1,000", "2,000", "3,000", "4,000"]
    assert "needs at least six points" in by_tokens.stdout
    by_steps = run(write(models), "--x", "steps")
    assert "Left out, without a positive number of steps: checkpoint-0." in by_steps.stderr
    assert [row[1] for row in rows(by_steps, "checkpoint")] == ["100", "200", "300"]


def test_files_are_put_together_and_a_model_counts_once(write):
    models = falling()
    first, second = (
        write(models[:4], "a.json"),
        write(models[3:], "b.json", settings={"max_length": 512, "batch_tokens": 9}),
    )
    result = run(first, second)
    assert [row[1] for row in rows(result, "runs/")] == [f"{size:,}" for size in SIZES]
    assert result.stderr.strip() == "The files differ in max_length: their values may not be comparable."


def test_unfinished_models_are_left_out(write):
    half = [
        {"model": "begun", "parameters": 7},
        model(9, 0.4, "other", layers={"first": {}}),
        model(8, 0.4, "empty", layers={"last": {ENTROPY: None}}),
        model(8, 0.4, "damaged", layers=[3], parameters={}),
    ]
    result = run(write(falling() + half))
    assert result.exit_code == 0
    assert (
        result.stderr.strip() == f"Left out, without a value of {ENTROPY} at layer last: begun, other, empty, damaged."
    )
    assert len(rows(result, "runs/")) == 7


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_points_are_not_fitted(write, count: int):
    result = run(write(falling(count)))
    assert result.exit_code == 1
    instead = f" To compare two models: matent measure runs/llama-{SIZES[1]} --baseline runs/llama-{SIZES[0]}"
    assert result.stderr.strip() == (
        f"Nothing was fitted. A power law needs at least three different sizes, got {count}."
        + (instead if count == 2 else "")
    )
    assert not rows(result, "a N^-b")


def test_points_that_do_not_fall_are_shown_and_not_fitted(write, tmp_path: Path):
    picture = tmp_path / "points.svg"
    result = run(write([model(size, 0.3 + size / 1e7) for size in SIZES]), "--plot", picture)
    assert result.exit_code == 1
    assert result.stderr.startswith("Nothing was fitted. The values do not fall:")
    assert len(rows(result, "runs/")) == 7
    assert not rows(result, "a N^-b")
    assert "</svg>" in picture.read_text(encoding="utf-8")


def test_a_fall_that_is_not_shown_is_told(write):
    values = (0.70, 0.71, 0.68, 0.70, 0.69)
    result = run(write([model(size, value) for size, value in zip(SIZES, values, strict=False)]))
    assert result.exit_code == 0
    assert "The interval of b reaches down to 0" in result.stdout
    assert "The interval of b" not in run(write(falling())).stdout


def test_names_are_shown_as_they_are(write):
    models = falling(6)
    models[0]["model"] = "runs/[red]$x$[/red]"
    assert rows(run(write(models)), "runs/")[0][0] == "runs/[red]$x$[/red]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "layer_09"], "no model has the layer 'layer_09'; there are: last."),
        (["--y", "entropy"], f"no model has 'entropy' at layer last; there are: diff_erank, {ENTROPY}."),
        (["--x", "width"], "'width' is not one of 'parameters', 'steps', 'tokens'."),
    ],
)
def test_bad_options(write, arguments: list[str], message: str):
    result = run(write(falling()), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "is not what `matent measure --out` writes"),
        (b'{"format": "other", "version": 1, "models": []}', "is not what `matent measure --out` writes"),
        (b'{"format": "matent-measure", "version": 2, "models": []}', "is not what `matent measure --out` writes"),
        (b'{"format": "matent-measure", "version": 1, "models": [3]}', "is not what `matent measure --out` writes"),
        (None, "cannot be read: No such file or directory."),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    result = run(path)
    assert result.exit_code == 2
    assert f"{path} {message}" in result.stderr


def test_folders_of_models_are_for_measure(tmp_path: Path):
    result = run(tmp_path, tmp_path)
    assert result.exit_code == 2
    assert "To compare two models: matent measure A B --baseline A" in " ".join(result.stderr.split())


def test_picture_that_cannot_be_written(write, tmp_path: Path):
    result = run(write(falling()), "--plot", tmp_path / "missing" / "law.png")
    assert result.exit_code == 1
    assert "law.png cannot be written: " in result.stderr
    assert rows(result, "a N^-b")  # the table is not lost


def test_missing_scipy_is_told(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "matent_callbacks.scaling_law", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    result = run(write(falling()))
    assert result.exit_code == 1
    assert result.stderr.strip() == "The fit needs scipy: pip install 'matent-callbacks[cli]'"
