"""Logs in several parts: evaluations beside training, and resumptions, which go back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks.report import RunError, read_run
from matent_callbacks.report._keys import Quantity
from matent_callbacks.report._run import Part, SeveralRunsError, join
from tests.conftest import collate, text_examples
from tests.report.conftest import lightning_module
from tests.report.test_one_run import hugging_face, lightning, tensorboard

BESIDE = "Its values stand beside those of the same steps."


@pytest.mark.parametrize("in_training", [False, True])
def test_trainer_that_trains_and_then_evaluates(make_trainer: Any, in_training: bool) -> None:
    from matent_callbacks.transformers import MatrixEntropyCallback

    trainer = make_trainer(
        [MatrixEntropyCallback(2, layers="all")],
        report_to=["tensorboard"],
        logging_steps=3,
        eval_strategy="steps" if in_training else "no",
        eval_steps=3,
    )
    trainer.train()
    trainer.evaluate()
    found = read_run(trainer.args.output_dir)
    assert found.curve(Quantity("loss")).steps == [3, 6]
    assert found.curve(Quantity("matrix_entropy", "last")).steps == [2, 4, 6]
    assert found.curve(Quantity("loss", "", "")).steps == ([3, 6] if in_training else [6])
    expected = {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}
    assert found.curve(Quantity("loss")).values == pytest.approx(list(expected.values()))
    assert not any("resumed" in note or "twice" in note for note in found.notes)


def test_lightning_that_validates_fits_and_tests(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from matent_callbacks.lightning import MatrixEntropyCallback

    module = lightning_module()
    module.test_step = lambda batch, batch_idx: module.log("test_loss", module.model(**batch).loss)
    loader = torch.utils.data.DataLoader(text_examples(24), batch_size=4, collate_fn=collate)
    trainer = pl.Trainer(
        logger=[TensorBoardLogger(tmp_path, name="events", version=""), CSVLogger(tmp_path, name="csv", version="")],
        callbacks=[MatrixEntropyCallback(2, layers="all")],
        max_epochs=2,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader, loader)
    trainer.validate(module, loader, verbose=False)
    trainer.test(module, loader, verbose=False)
    assert len(list((tmp_path / "events").glob("*tfevents*"))) > 2
    for folder in ("csv", "events"):
        run = read_run(tmp_path / folder)
        assert run.curve(Quantity("loss")).steps == [1, 3, 5, 7, 9, 11]
        assert run.curve(Quantity("effective_rank", "last")).steps == [1, 3, 5, 7, 9, 11]
        assert run.curve(Quantity("loss", "", "")).steps == [0, 5, 11, 12]
        assert run.columns["test_loss"].steps == [12]
        assert not any("resumed" in note or "twice" in note for note in run.notes)


def part(name: str, steps: range, *keys: str, **further: dict[int, float]) -> Part:
    """What was logged at each of the steps, and at single ones; the value is the step, and half of it in part b."""
    scale = 0.5 if name == "b" else 1.0
    records = [{"step": float(s), **dict.fromkeys(keys, scale * s)} for s in steps]
    return Part(name, [*({"step": s, key: v} for key, at in further.items() for s, v in at.items()), *records])


def test_a_resumption_that_begins_with_an_evaluation_counts_from_its_first_training_step() -> None:
    first = part("a", range(1, 21), "loss", "effective_rank/last", eval_loss={6: 6.0, 12: 12.0, 18: 18.0})
    records, notes = join([first, part("b", range(13, 25), "loss", eval_loss={12: 0.25, 18: 0.5})])
    by_step = {record["step"]: record for record in records}
    assert by_step[12] == {"step": 12, "loss": 12.0, "effective_rank/last": 12.0, "eval_loss": 0.25}
    assert by_step[13] == {"step": 13, "loss": 6.5}
    assert by_step[18] == {"step": 18, "loss": 9.0, "eval_loss": 0.5}
    assert notes[0].endswith("b, with steps 12 to 24. Steps 13 to 20 were run twice: the later part counts.")
    assert notes[1] == "1 step between 12 and 12 is logged more than once in b: the last record counts."
    # One that was resumed at its very last reading, and then broke off.
    records, notes = join([first, part("b", range(20, 22), "loss")])
    assert (records[-2], records[-3]["loss"]) == ({"step": 20, "loss": 10.0}, 19.0)
    assert "Steps 20 to 20 were run twice" in notes[0]


def test_evaluations_of_earlier_steps_stand_beside_the_training() -> None:
    first = part("a", range(1, 13), "loss", eval_loss={4: 4.0})
    records, notes = join([first, part("b", range(4, 13, 4), "eval_loss", "epoch", "eval_wiki_loss")])
    assert [record["loss"] for record in records] == list(range(1, 13))
    assert [record["eval_loss"] for record in records if "eval_loss" in record] == [2.0, 4.0, 6.0]
    assert notes[0] == f"The log has another part, b, with steps 4 to 12. {BESIDE}"
    # Evaluations alone that go on, and other names of one that begins anew.
    assert "resumed" in join([part("a", range(1, 6), "eval_loss"), part("b", range(4, 9), "eval_loss")])[1][0]
    assert BESIDE in join([part("a", range(1), "eval_loss"), part("b", range(1), "test_loss")])[1][0]
    for key, other in (("loss", "loss"), ("loss", "reward"), ("eval_loss", "eval_loss"), ("ce", "ce")):
        with pytest.raises(SeveralRunsError):
            join([part("a", range(1, 9), key), part("b", range(1, 9), other)])


def test_each_log_of_a_folder_is_named_so_that_it_can_be_read(tmp_path: Path) -> None:
    for name, start in (("a", 3.0), ("b", 5.0)):
        lightning(tmp_path / name, start=start)
        for begin in (1, 7):
            tensorboard(tmp_path / f"{name}_tb", start=start, begin=begin)
    with pytest.raises(RunError) as caught:
        read_run(tmp_path)
    told = str(caught.value).partition("name one of ")[2].removesuffix(".")
    names = told.replace(", or all with --all. It also holds logs of other kinds: ", ", ").split(", ")
    assert names == ["a_tb", "b_tb", "a", "b"]
    for name in names:
        assert len(read_run(tmp_path / name).steps) == (12 if "tb" in name else 6)
    # Two event files of one folder, which may be that of a subfolder.
    for folder in ("two", "two/events"):
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
        for i in range(2):
            tensorboard(tmp_path / folder, start=i + 1.0)
        with pytest.raises(RunError, match="holds 2 logs that do not continue one another") as caught:
            read_run(tmp_path / "two")
        names = str(caught.value).partition("name one of ")[2].removesuffix(".").split(", ")
        assert len({read_run(tmp_path / "two" / name).curve(Quantity("loss")).values[0] for name in names}) == 2
    # Beside a Trainer's own record.
    hugging_face(tmp_path / "two")
    assert "tfevents" not in str(read_run(tmp_path / "two" / "trainer_state.json").source)
