"""Folders that hold several runs, and several logs of one run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from matent_callbacks.report import Run, RunError, read_run
from matent_callbacks.report._tensorboard import find
from tests.report.conftest import Logged
from tests.report.test_cli_report import invoke


def hugging_face(folder: Path, *, start: float = 3.0, steps: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": s, "loss": start - 0.1 * s, "effective_rank/last": 5.0 + s} for s in range(1, steps + 1)]
    state = {"global_step": steps, "max_steps": 6, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def lightning(folder: Path, *, start: float = 3.0, begin: int = 1, key: str = "loss") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{s},{start - 0.1 * s},{5.0 + s}\n" for s in range(begin, begin + 6))
    (folder / "metrics.csv").write_text(f"step,{key},effective_rank/last\n{rows}")
    return folder


def tensorboard(folder: Path, *, start: float = 3.0, begin: int = 1) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for s in range(begin, begin + 6):
            writer.add_scalar("train/loss", start - 0.1 * s, s)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_run(folder)
    result = invoke(folder, "--out", folder / "report.html")
    assert result.exit_code == 2
    assert str(caught.value) in result.output
    assert not (folder / "report.html").exists()
    return str(caught.value)


def test_runs_of_different_kinds_are_refused_and_named(stopped: Logged, tmp_path: Path) -> None:
    """A Trainer's state, W&B runs and CSV logs that lie in one folder, in whichever places."""
    for i, (own, offline) in enumerate([("", ""), ("", "wandb"), ("hf", ""), ("hf", "wandb"), ("hf", "online/wandb")]):
        folder = tmp_path / str(i)
        hugging_face(folder / own)
        shutil.copytree(stopped.wandb, folder / offline / stopped.wandb.name)
        lightning(folder / "csv" / "version_0", start=9.0)
        told = refused(folder)
        names = [own or "trainer_state.json", "csv", offline.partition("/")[0] or stopped.wandb.name]
        assert all(name in told for name in names), told
    told = refused(tmp_path / "0")
    # Each of the names can be read.
    assert "holds 3 runs: name one of trainer_state.json, csv/version_0, " in told
    for name in told.partition("name one of ")[2].removesuffix(".").split(", "):
        assert read_run(tmp_path / "0" / name).records


def test_a_log_of_its_own_beside_others(tmp_path: Path) -> None:
    lightning(tmp_path / "other" / "version_0")
    assert len(read_run(tmp_path / "other").steps) == 6
    tensorboard(tmp_path / "events", start=7.0)
    assert "holds 2 runs: name one of " in refused(tmp_path)
    # Nothing in common is no evidence that they are one.
    shutil.rmtree(tmp_path / "events")
    hugging_face(tmp_path)
    lightning(tmp_path / "other" / "version_0", key="reward", begin=100)
    assert "holds 2 runs: name one of trainer_state.json, other/version_0" in refused(tmp_path)


@pytest.mark.parametrize("kind", [hugging_face, lightning, tensorboard])
def test_a_folder_of_runs_names_all(kind: object, tmp_path: Path) -> None:
    for i, seed in enumerate(("seed_10", "seed_2")):
        kind(tmp_path / seed, start=3.0 + i)  # type: ignore[operator]
    told = refused(tmp_path)
    names = "seed_10, seed_2" if kind is tensorboard else "seed_2, seed_10"
    assert f"name one of {names}, or all with --all" in told
    assert ("is no run that can be read" in told) == (kind is not tensorboard)
    out = tmp_path / "report.html"
    assert invoke(tmp_path, "--all", "--out", out).exit_code == 0
    assert "seed_2 and seed_10</title>" in out.read_text()


def test_event_files_of_one_second_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"events.out.tfevents.1764000000.host.7.{number}" for number in (9, 10)]
    for name in names[::-1]:
        (tmp_path / name).touch()
    assert [file.name for file in find(tmp_path)] == names


def test_runs_in_folders_are_not_joined_though_one_begins_where_another_ends(tmp_path: Path) -> None:
    for make, name in ((lightning, "csv"), (tensorboard, "events")):
        make(tmp_path / name / "a" / "version_0")
        make(tmp_path / name / "b" / "version_0", begin=7)
        assert "name one of a, b, or all with --all" in refused(tmp_path / name)
        # Parts of one resumed run are beside each other.
        make(tmp_path / name / "a" / "version_1", begin=7)
        assert len(read_run(tmp_path / name / "a").steps) == 12
    # Trainers' runs, each with event files of its own.
    for seed in ("1", "2"):
        hugging_face(tmp_path / "trainers" / seed)
        tensorboard(tmp_path / "trainers" / seed / "runs" / "host", begin=int(seed))
    assert "name one of 1, 2, or all with --all" in refused(tmp_path / "trainers")
    shutil.rmtree(tmp_path / "trainers" / "2")
    assert "name one of 1, or all" in refused(tmp_path / "trainers")


def test_wandb_runs_online_and_offline_are_several(tmp_path: Path) -> None:
    for name in ("wandb/offline-run-2-b", "wandb/run-1-a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"run-{name[-1]}.wandb").touch()
    assert "holds 2 W&B runs: name one of wandb/run-1-a, wandb/offline-run-2-b" in refused(tmp_path)


def test_several_logs_of_one_run_are_one_run(stopped: Logged, resumed: Path, tmp_path: Path) -> None:
    """W&B's folder inside the output folder of its run; CSV and TensorBoard of Lightning beside each other."""
    folder = tmp_path / "run"
    shutil.copytree(stopped.folder, folder)
    shutil.copytree(stopped.wandb, folder / "wandb" / stopped.wandb.name)
    (folder / "wandb" / "latest-run").symlink_to(folder / "wandb" / stopped.wandb.name)
    run = read_run(folder)
    assert run.source == "Hugging Face Trainer, trainer_state.json"
    assert run.notes[1:] == [
        f"The run is also logged in wandb/{stopped.wandb.name}; what is shown is from trainer_state.json."
    ]
    # That of a checkpoint is the beginning of the same run.
    (folder / "trainer_state.json").unlink()
    assert len(read_run(folder).notes) == 2
    run = read_run(resumed)
    assert [note for note in run.notes if note.startswith("The run is also logged in csv; what is shown is from ")]
    assert run.steps == read_run(resumed / "csv").steps
    version = resumed / "csv" / "lightning_logs" / "version_1"
    shutil.copy(next((resumed / "tensorboard").rglob("version_1/events*")), version)
    try:
        assert read_run(version).source == "Lightning, metrics.csv"
    finally:
        next(version.glob("events*")).unlink()
    # Event files of earlier attempts, where the Trainer itself writes them.
    tensorboard(folder / "runs" / "earlier", start=8.0)
    assert len(read_run(folder).notes) == 2


def test_runs_from_one_seed_are_not_one_run(tmp_path: Path) -> None:
    lightning(hugging_face(tmp_path))
    assert read_run(tmp_path).notes[1:] == [
        "The run is also logged in metrics.csv; what is shown is from trainer_state.json."
    ]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join([*rows[:3], *(f"{s},7.0,8.5" for s in range(3, 7))]) + "\n")
    assert "holds 2 runs: name one of trainer_state.json, metrics.csv" in refused(tmp_path)


def test_a_log_beside_it_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    (tmp_path / "offline-run-1-a").mkdir()
    (tmp_path / "offline-run-1-a" / "run-a.wandb").touch()
    assert read_run(tmp_path).notes[1:] == [
        "Beside it lies offline-run-1-a, which holds a log without a single number in it; it is left out."
    ]


def test_checkpoints_are_a_part_of_their_run(tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run")
    for steps in (2, 4):
        hugging_face(run / f"checkpoint-{steps}", steps=steps)
    assert read_run(run).steps == [1, 2, 3, 4, 5, 6]
    out = tmp_path / "report.html"
    for state in (True, False):
        result = invoke(run, "--all", "--out", out)
        assert (result.exit_code, result.output.count("\n")) == (0, 1)
        assert result.output.endswith(f"steps 1 to {6 if state else 4} of run\n")
        (run / "trainer_state.json").unlink(missing_ok=True)
    # Runs of a search lie in the folder of the search.
    for trial in ("run-0", "run-1"):
        hugging_face(tmp_path / "search" / trial / "checkpoint-4", steps=4)
        tensorboard(tmp_path / "search" / "runs" / trial)
    assert "name one of runs/run-0, runs/run-1." in refused(tmp_path / "search")
    # A folder that only links to runs.
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(run)
    assert invoke(tmp_path / "links", "--all", "--out", out).exit_code == 0


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("report", "jinja2"),
        ("report", "matplotlib"),
        ("scaling", "scipy"),
        ("scaling", "matplotlib"),
        ("report", "typer"),
        ("measure", "rich"),
    ],
)
def test_what_is_missing_is_named(command: str, module: str, tmp_path: Path) -> None:
    arguments = {
        "report": [str(hugging_face(tmp_path / "run")), "--out", str(tmp_path / "report.html")],
        "scaling": [str(results(tmp_path)), "--x", "parameters", "--plot", str(tmp_path / "law.png")],
        "measure": [str(tmp_path), "--text", str(tmp_path / "results.json"), "--out", str(tmp_path / "out.json")],
    }
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {[command, *arguments[command]]!r}; "
        "from matent_callbacks.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "400"})
    told = ended.stderr
    assert ended.returncode in (1, 2)
    assert "Traceback" not in told
    extra = "plot" if (command, module) == ("scaling", "matplotlib") else "cli"
    assert f"needs {module}: pip install 'matent-callbacks[{extra}]'" in told.replace("\n", " "), told


def results(folder: Path) -> Path:
    models = [
        {
            "model": f"m{n}",
            "parameters": n,
            "hidden_size": 8,
            "num_sequences": 9,
            "layers": {"last": {"normalized_sequence_matrix_entropy": {"value": 0.9 - 0.1 * i, "low": 0, "high": 1}}},
        }
        for i, n in enumerate((1000, 10_000, 100_000, 1_000_000, 10_000_000))
    ]
    file = folder / "results.json"
    file.write_text(json.dumps({"format": "matent-measure", "version": 1, "settings": {}, "models": models}))
    return file


def test_read_run_returns_the_run_of_a_file(tmp_path: Path) -> None:
    run: Run = read_run(hugging_face(tmp_path / "run") / "trainer_state.json")
    assert (run.name, run.steps) == ("run", [1, 2, 3, 4, 5, 6])
