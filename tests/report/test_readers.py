"""What is read out of the folders that real runs leave, against what the Trainer had in memory."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks.plot import series
from matent_callbacks.report import Run, RunError, read_run
from matent_callbacks.report._keys import Quantity, normalise, parse
from matent_callbacks.report._run import Part, join
from tests.report.conftest import HOSTILE, Logged


def known(records: list[dict[str, Any]]) -> set[str]:
    return {key for record in records for key in record if parse(key) and key != "train_loss"}


def test_the_three_logs_of_one_hugging_face_run_are_the_same_run(stopped: Logged) -> None:
    keys = known(stopped.history)
    assert {"loss", "eval_loss", "matrix_entropy/layer_00", "eval_effective_rank/last", "alignment/image_text"} < keys
    assert {"spectrum_top_1/layer_00", "eval_spectrum_top_16/last"} < keys
    assert {"effective_rank/vision_encoder", "eval_effective_rank/image_text", "plateau/loss/since_progress"} < keys
    for folder in (stopped.folder, stopped.tensorboard, stopped.wandb):
        run = read_run(folder)
        assert known(run.records) == keys
        for key in keys:
            steps, values = series(run.records, key)
            expected_steps, expected = series(stopped.history, key)
            assert steps == expected_steps, (folder, key)
            assert values == pytest.approx(expected, rel=1e-6)
    assert read_run(stopped.folder).name == read_run(stopped.wandb).name == HOSTILE


def test_hugging_face_run_that_a_plateau_ended(stopped: Logged) -> None:
    run = read_run(stopped.folder)
    last = stopped.history[-1]["step"]
    assert run.stop is not None
    assert (run.stop.step, run.stop.monitor) == (last, "loss")
    assert run.stop.reason.startswith(f"plateau at step {last}, value ")
    assert run.notes == [f"The run was stopped at step {last} of 40 by PlateauStopping."]
    # Its mean over the whole run is no reading of the last step.
    assert "train_loss" in stopped.history[-1]
    assert all("train_loss" not in record for record in run.records)


def test_hugging_face_run_that_was_cut_off_ends_with_its_newest_checkpoint(stopped: Logged, tmp_path: Path) -> None:
    shutil.copytree(stopped.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    run = read_run(tmp_path)
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.stop is None
    assert run.notes[0].startswith("The record ends at step 6 of 40: the run was cut off or stopped after that")
    # A checkpoint that was being written when the run died leaves the one before it.
    text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(text[: len(text) // 2])
    run = read_run(tmp_path)
    assert run.steps[-1] == 6
    assert "checkpoint-10/trainer_state.json that is damaged or was cut off" in run.notes[-1]
    # The newest by number, not by name.
    shutil.copytree(stopped.folder / "checkpoint-6", tmp_path / "checkpoint-9")
    assert read_run(tmp_path).source.endswith("checkpoint-9/trainer_state.json")
    # A folder's own state that is older than its checkpoints is of an earlier call.
    state = json.loads(text)
    state.update(global_step=2, log_history=state["log_history"][:2])
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).steps[-1] == 6


def test_a_stop_by_another_callback_is_not_put_down_to_the_plateau(make_trainer: Any) -> None:
    from transformers import TrainerCallback

    from matent_callbacks.transformers import PlateauStopping

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 3

    trainer = make_trainer([PlateauStopping("loss", min_delta=1.0, patience=2), StopAtThree()])
    trainer.train()
    trainer.save_state()
    run = read_run(trainer.args.output_dir)
    assert run.stop is None
    assert run.notes == ["The run was stopped at step 3 of 6; by which callback is not in the record."]
    trainer = make_trainer()
    trainer.train()
    trainer.save_state()
    assert read_run(trainer.args.output_dir).notes == ["The run made all of its 6 steps."]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_lightning_run_that_was_resumed(resumed: Path, logger: str) -> None:
    run = read_run(resumed / logger)
    rows: dict[int, dict[str, float]] = {}
    for version in ("version_0", "version_1"):
        with open(resumed / "csv" / "lightning_logs" / version / "metrics.csv", newline="") as file:
            logged = list(csv.DictReader(file))
        # A later part takes the place of the earlier one from its first step on, which in Lightning 2.4 is the last one
        # of the checkpoint.
        first = min(int(row["step"]) for row in logged)
        rows = {step: values for step, values in rows.items() if step < first}
        for row in logged:
            values = {k: float(v) for k, v in row.items() if v and k not in ("step", "epoch")}
            rows.setdefault(int(row["step"]), {}).update(values)
    # Lightning 2.4 does not write the last row.
    assert run.steps == sorted(rows)
    assert set(rows) >= set(range(23))
    for record in run.records:
        expected = {normalise(key): value for key, value in rows[int(record["step"])].items()}
        read = {key: value for key, value in record.items() if key not in ("step", "epoch", "hp_metric")}
        assert read == pytest.approx(expected, rel=1e-6)
    assert run.keys[Quantity("loss")] == "train_loss"
    assert run.keys[Quantity("effective_rank", "last", "")] == "eval_effective_rank/last"
    assert "does not tell whether the run was finished" in run.notes[0]
    twice = f"Steps {first} to 19 were run twice: the later part counts."
    assert f"version_1, with steps {first} to {max(rows)}. {twice}" in run.notes[1]
    # Where one part is named, that is the run.
    part = next((resumed / logger).rglob("version_0"))
    assert read_run(part).steps == list(range(20))
    assert len(read_run(part).notes) == 1


def test_what_only_the_abandoned_part_logged_is_left_out() -> None:
    first = Part("a", [{"step": s, "loss": 1.0, "effective_rank/last": 2.0} for s in range(1, 11)])
    second = Part("b", [{"step": s, "loss": 3.0} for s in range(6, 13)])
    records, notes = join([first, second])
    assert records == first.records[:5] + second.records
    assert notes == [
        "The run was resumed: its log has another part, b, with steps 6 to 12. "
        "Steps 6 to 10 were run twice: the later part counts."
    ]
    _, notes = join([first, Part("b", [{"step": 20, "loss": 3.0}, {"step": 20, "loss": 4.0}])])
    assert notes[1:] == [
        "Between steps 10 and 20 nothing is logged, where the run was resumed.",
        "1 step between 20 and 20 is logged more than once in b: the last record counts.",
    ]


def test_runs_that_are_not_one_are_not_joined(resumed: Path, stopped: Logged, tmp_path: Path) -> None:
    source = resumed / "csv" / "lightning_logs" / "version_0"
    for version in ("version_2", "version_10"):
        shutil.copytree(source, tmp_path / "logs" / version)
    with pytest.raises(
        RunError, match="holds 2 logs that do not continue one another: name one of version_2, version_10"
    ):
        read_run(tmp_path / "logs")
    for name in ("offline-run-1-a", "offline-run-2-b"):
        (tmp_path / "offline" / "wandb" / name).mkdir(parents=True)
        (tmp_path / "offline" / "wandb" / name / f"run-{name[-1]}.wandb").touch()
    with pytest.raises(RunError, match="holds 2 W&B runs: name one of wandb/offline-run-1-a, wandb/offline-run-2-b"):
        read_run(tmp_path / "offline")


def test_csv_whose_last_line_was_cut_off(resumed: Path, tmp_path: Path) -> None:
    text = (resumed / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    whole = read_run(resumed / "csv" / "lightning_logs" / "version_0")
    # In the middle of a number, which would still be one.
    (tmp_path / "metrics.csv").write_text(text.rstrip()[:-3])
    run = read_run(tmp_path)
    assert run.notes[-1].endswith("metrics.csv is cut off; it is left out.")
    assert run.records[:-1] == whole.records[:-1]
    assert len(run.records[-1].keys() - whole.records[-1].keys()) == 0
    assert all(whole.records[-1][key] == value for key, value in run.records[-1].items())


def test_wandb_run_that_was_cut_off(stopped: Logged, tmp_path: Path) -> None:
    whole = read_run(stopped.wandb)
    assert whole.notes == [f"The log ends at step {whole.steps[-1]} of 40, and the program went on to its end."]
    (file,) = stopped.wandb.glob("*.wandb")
    data = file.read_bytes()
    # Wherever the cut is, the last record is either whole or not there.
    for size in range(len(data) // 2, len(data) // 2 + 200):
        (tmp_path / file.name).write_bytes(data[:size])
        run = read_run(tmp_path)
        assert 0 < len(run.records) < len(whole.records)
        assert run.records == whole.records[: len(run.records)]
    assert run.notes == [
        f"The log ends at step {run.steps[-1]} of 40 without an end mark: the run was cut off, or is still running."
    ]


def test_tensorboard_log_that_was_cut_off(stopped: Logged, tmp_path: Path) -> None:
    (file,) = stopped.tensorboard.rglob("*tfevents*")
    data = file.read_bytes()
    (tmp_path / file.name).write_bytes(data[: len(data) * 2 // 3])
    run = read_run(tmp_path)
    assert 0 < len(run.steps) < len(read_run(stopped.tensorboard).steps)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "is no run that can be read: expected trainer_state.json or checkpoint-* "),
        ("trainer_state.json", "[]", "that is not the state of a Trainer: it has no log_history"),
        ("trainer_state.json", '{"log_history": [', "that is damaged or was cut off"),
        ("trainer_state.json", '{"log_history": []}', "holds a log without a single number in it"),
        ("metrics.csv", "epoch,loss\n1,2\n", "holds a metrics.csv without a column `step`"),
        ("metrics.csv", "", "holds a metrics.csv without a column `step`"),
        ("run-a.wandb", "", "holds a log without a single number in it"),
        ("events.out.tfevents.1.a", "", "holds a log without a single number in it"),
    ],
)
def test_what_is_no_run_is_told_in_one_sentence(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(RunError) as caught:
        read_run(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(repr(str(tmp_path)))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("key", "quantity"),
    [
        ("loss", Quantity("loss")),
        ("train_loss_step", Quantity("loss")),
        ("eval/loss", Quantity("loss", "", "")),
        ("val_loss", Quantity("loss", "", "")),
        ("eval_wiki_loss", Quantity("loss", "", "wiki")),
        ("val_loss/dataloader_idx_1", Quantity("loss", "", "loader 1")),
        ("train/matrix_entropy/last", Quantity("matrix_entropy", "last")),
        ("eval_sequence_matrix_entropy/last", Quantity("sequence_matrix_entropy", "last", "")),
        ("eval_embedding_matrix_entropy/last", Quantity("embedding_matrix_entropy", "last", "")),
        ("eval_wiki_embedding_rankme/pooler", Quantity("embedding_rankme", "pooler", "wiki")),
        ("train/holevo_information/last", Quantity("holevo_information", "last")),
        ("eval/my_set_effective_rank/layer_01", Quantity("effective_rank", "layer_01", "my_set")),
        ("val_effective_rank/last/dataloader_idx_0", Quantity("effective_rank", "last", "loader 0")),
        ("train/spectrum_top_8/model.layers.0.mlp", Quantity("spectrum_top_8", "model.layers.0.mlp")),
        ("plateau/loss/since_progress", Quantity("plateau", "loss/since_progress")),
        ("train/train_loss", None),
        ("eval_runtime", None),
        ("learning_rate", None),
    ],
)
def test_names_of_every_logger_mean_the_same(key: str, quantity: Quantity | None) -> None:
    name = normalise(key)
    assert (None if name is None else parse(name)) == quantity


def test_nan_is_read_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": "Infinity"}, {"step": 3, "loss": 1.5}]}'
    )
    run: Run = read_run(tmp_path)
    assert [repr(value) for value in run.curve(Quantity("loss")).values] == ["nan", "inf", "1.5"]


def test_reading_imports_no_framework_and_no_logger() -> None:
    heavy = ["transformers", "lightning", "wandb", "matplotlib", "typer", "scipy", "tensorboard"]
    code = f"import sys, matent_callbacks.report; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
