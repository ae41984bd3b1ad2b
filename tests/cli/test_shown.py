"""What ``matent measure`` says about intervals that are not there, and text that is a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from matent_callbacks.cli._app import run
from tests.cli.models import documents, save_model, write_lines

CAPTIONS = ("below each value", "below each difference")


@pytest.mark.parametrize("count", [1, 5])
def test_intervals_are_explained_where_there_are_any(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model = (save_model(tmp_path / name, "llama", seed=seed) for seed, name in enumerate("ab"))
    text = write_lines(tmp_path / "text.txt", documents(count))
    assert run(["measure", str(model), "--baseline", str(base), "--text", str(text)]) == 0
    shown = capsys.readouterr().out
    assert [caption in shown for caption in CAPTIONS] == [count > 1] * 2


@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".txt"])
def test_a_table_is_told_to_be_read_line_by_line(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "llama")
    table = write_lines(tmp_path / f"table{suffix}", ["id,text", *documents(4)])
    assert run(["measure", str(model), "--text", str(table)]) == 0
    told = f"--text has a table in {table}: each of its lines counts as a document" in capsys.readouterr().err
    assert told == (suffix != ".txt")
