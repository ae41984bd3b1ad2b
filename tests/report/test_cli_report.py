"""``matent report`` as a command."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from matent_callbacks.cli.report import report
from tests.report.conftest import HOSTILE, Logged

app = typer.Typer()
app.command()(report)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400", "NO_COLOR": "1"})


def assert_needs_nothing_else(html: str) -> None:
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "https://" not in html
    assert "<script" not in html


def test_writes_one_page(stopped: Logged, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = invoke(stopped.folder, "--out", out)
    assert result.exit_code == 0, result.output
    html = out.read_text(encoding="utf-8")
    assert "<h1>&lt;img src=x onerror=alert(1)&gt;</h1>" in html
    assert_needs_nothing_else(html)
    # Whatever is written twice is written the same.
    invoke(stopped.folder, "--out", out)
    assert out.read_text(encoding="utf-8") == html
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_no_run_ends_with_2_and_one_sentence(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--out", tmp_path / "report.html")
    assert result.exit_code == 2
    assert "is no run that can be read" in result.output
    assert invoke(tmp_path / "none").exit_code == 2
    assert not (tmp_path / "report.html").exists()


def test_where_the_page_cannot_be_written(stopped: Logged, tmp_path: Path) -> None:
    result = invoke(stopped.folder, "--out", tmp_path / "no" / "report.html")
    assert result.exit_code == 2
    assert "There is no folder" in result.output
    result = invoke(stopped.folder, "--out", tmp_path)
    assert result.exit_code == 2
    assert "is a folder; expected the file to write" in result.output


def test_a_full_disk_leaves_the_earlier_page(stopped: Logged, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        result = invoke(stopped.folder, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2
    assert "cannot be written: File too large" in result.output
    assert out.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_left(stopped: Logged) -> None:
    result = invoke(stopped.folder, "--out", "/dev/full")
    assert result.exit_code == 2
    assert "cannot be written: No space left on device" in result.output


def test_several_runs_are_one_page(stopped: Logged, resumed: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = invoke(stopped.folder, resumed / "csv", stopped.wandb, "--out", out)
    assert result.exit_code == 0, result.output
    html = out.read_text(encoding="utf-8")
    assert "<h1>3 runs side by side</h1>" in html
    assert_needs_nothing_else(html)
    assert len(result.output.splitlines()) == 3
    invoke(stopped.folder, resumed / "csv", stopped.wandb, "--out", out)
    assert out.read_text(encoding="utf-8") == html
    result = invoke(stopped.folder, tmp_path / "none", "--out", out)
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_all_runs_of_a_folder(stopped: Logged, resumed: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "report.html"
    for name in ("seed_10", "seed_2"):
        shutil.copytree(stopped.folder / "checkpoint-6", runs / name / "checkpoint-6")
    shutil.copytree(stopped.wandb, runs / stopped.wandb.name)
    (runs / "latest-run").symlink_to(runs / stopped.wandb.name)
    (runs / "notes").mkdir()
    (runs / ".hidden").mkdir()
    result = invoke(runs, "--all", "--out", out)
    assert result.exit_code == 0, result.output
    # With numbers as numbers; what is no run is passed over, and no run is there twice.
    assert [line.rpartition(" of ")[2] for line in result.output.splitlines()] == [HOSTILE, "seed_2", "seed_10"]
    # One that is damaged is told, and the others are shown.
    (runs / "broken").mkdir()
    (runs / "broken" / "trainer_state.json").write_text("{")
    result = invoke(runs, "--all", "--out", out)
    assert result.exit_code == 1
    assert "Left out: " in result.output
    assert "damaged or was cut off" in result.output
    assert "3 runs side by side" in out.read_text(encoding="utf-8")
    for folder, told in ((runs / "notes", "There is no run that can be read in"), (out, "is no folder of runs")):
        result = invoke(folder, "--all", "--out", out)
        assert result.exit_code == 2
        assert told in result.output
    # A single one has the page of a single one.
    shutil.copytree(runs / "seed_2", tmp_path / "one" / "seed_2")
    assert invoke(tmp_path / "one", "--all", "--out", out).exit_code == 0
    assert "<h1>seed_2</h1>" in out.read_text(encoding="utf-8")
