"""Short lines in place of all numbers, in a real Trainer, with and without its progress bar."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from matent_callbacks.transformers import MatrixEntropyCallback, ReadingPrinter
from matent_callbacks.transformers._reading_printer import reading_line

LINE = re.compile(r"step +(\d+)  loss ([\d.]+)  effective_rank: layer_00 ([\d.]+), layer_02 ([\d.]+), last ([\d.]+)")
BOTH = pytest.mark.parametrize("quiet", [True, False], ids=["printed", "progress bar"])


@BOTH
def test_one_line_a_reading_and_nothing_else(make_trainer, capsys, quiet):
    trainer = make_trainer([ReadingPrinter(), MatrixEntropyCallback(2, layers="all")], disable_tqdm=quiet)
    trainer.train()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    found = [match for line in lines if (match := LINE.fullmatch(line))]
    assert [int(match[1]) for match in found] == [2, 4, 6]
    for match in found:
        record = next(r for r in trainer.state.log_history if r["step"] == int(match[1]))
        keys = ("loss", *(f"effective_rank/{layer}" for layer in ("layer_00", "layer_02", "last")))
        assert [float(text) for text in match.groups()[1:]] == pytest.approx([record[k] for k in keys], rel=5e-3)
    # In between a line on the loss alone, and at the end the Trainer's own record of the run.
    assert [line for line in lines if re.fullmatch(r"step +[135]  loss [\d.]+", line)] == lines[:-1:2]
    assert "train_runtime" in lines[-1]
    assert len(lines) == 7


@BOTH
def test_without_it_the_trainer_prints_as_ever(make_trainer, capsys, quiet):
    printer = ReadingPrinter()
    trainer = make_trainer([printer, MatrixEntropyCallback(2, layers="all")], disable_tqdm=quiet)
    trainer.train()
    (usual,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback | ProgressCallback))
    assert "on_log" not in vars(usual)
    capsys.readouterr()
    trainer.remove_callback(printer)
    trainer.train()
    assert capsys.readouterr().out.count("'effective_rank/layer_01'") == 3


def test_a_removed_one_is_silent_after_a_training_that_broke_off(make_trainer, capsys):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("broken")

    printer, breaks = ReadingPrinter(), Breaks()
    trainer = make_trainer([printer, breaks])
    with pytest.raises(KeyError):
        trainer.train()
    trainer.remove_callback(printer)
    trainer.remove_callback(breaks)
    trainer.train()
    assert "'loss'" in capsys.readouterr().out


def test_what_a_subclass_prints_is_its_own(make_trainer, capsys):
    class Own(PrinterCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            print("own", state.global_step)

    trainer = make_trainer([ReadingPrinter(), Own()])
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if type(c) is PrinterCallback))
    trainer.train()
    assert capsys.readouterr().out.splitlines()[:6] == [f"own {step}" for step in range(1, 7)]


def test_training_is_the_same_and_so_is_what_is_logged(make_trainer):
    def run(*callbacks):
        trainer = make_trainer(
            [*callbacks, MatrixEntropyCallback(2, layers="all")], eval_strategy="steps", eval_steps=3
        )
        trainer.train()
        timed = ("runtime", "per_second")
        history = [{k: v for k, v in r.items() if not k.endswith(timed)} for r in trainer.state.log_history]
        return history, {k: v.clone() for k, v in trainer.model.state_dict().items()}, torch.get_rng_state()

    plain, with_it = run(), run(ReadingPrinter())
    assert plain[0] == with_it[0]
    assert all(torch.equal(plain[1][name], with_it[1][name]) for name in plain[1])
    assert torch.equal(plain[2], with_it[2])


def test_what_goes_wrong_is_told_once_and_printed_as_ever(make_trainer, capsys):
    class LogsText(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs["effective_rank/last"] = "no number"

    trainer = make_trainer([ReadingPrinter(), LogsText()])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 6
    assert sum("Training goes on without its lines (ReadingPrinter)" in str(w.message) for w in told) == 1
    assert capsys.readouterr().out.count("'loss'") == 6
    with pytest.raises(ValueError, match="Unknown format code"):
        make_trainer([ReadingPrinter(on_error="raise"), LogsText()]).train()


def test_copies_and_checkpoints(make_trainer, capsys):
    trainer = make_trainer([ReadingPrinter()], save_strategy="steps", save_steps=3)
    trainer.train()
    resumed = make_trainer([copy.deepcopy(trainer.callback_handler.callbacks[0])], save_strategy="no")
    assert isinstance(resumed.callback_handler.callbacks[0], ReadingPrinter)
    capsys.readouterr()
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == list("456")


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"loss": 1.25, "epoch": 1.0}, "step     7  loss 1.25"),
        ({"train_loss": 1.25, "train_runtime": 3.0}, None),
        ({"eval_loss": 2.0, "eval_effective_rank/last": 3.0}, "step     7  eval_loss 2  eval_effective_rank: last 3"),
        ({"english/effective_rank/last": 3.0}, "step     7  english/effective_rank: last 3"),
        ({"sequence_effective_rank/last": 3.0, "effective_rank/connector": 2.0, "eval_runtime": 1.0}, None),
        (
            {f"effective_rank/layer_{i}": float(i) for i in (10, 9, 0, 2)},
            "step     7  effective_rank: layer_0 0, layer_9 9, layer_10 10",
        ),
    ],
)
def test_what_is_in_a_line(record, line):
    assert reading_line(7, record, "effective_rank") == line
