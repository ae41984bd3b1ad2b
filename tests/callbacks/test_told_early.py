"""What is told as soon as it can be known: names nothing logs, steps that never come, the wrong kind of callback."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import transformers

import matent_callbacks.lightning as of_lightning
import matent_callbacks.transformers as of_transformers
from tests.conftest import collate, text_examples
from tests.lightning import test_plateau_stopping as simple
from tests.lightning.test_matrix_entropy_callback import loader
from tests.lightning.test_matrix_entropy_callback import make_module as make_lightning_module
from tests.lightning.test_matrix_entropy_callback import make_trainer as make_lightning_trainer
from tests.versions import BOTH_PACKAGES, needs

__all__ = ["make_lightning_module", "make_lightning_trainer"]

EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
PLATEAU: dict[str, Any] = {"min_delta": 1.0, "patience": 3}


class Caught:
    """Warnings of a run so far, by the step at which they came."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []
        self.step = 0

    def show(self, message: Any, *_: Any, **__: Any) -> None:
        self.told.append((self.step, str(message)))

    def about(self, what: str) -> list[tuple[int, str]]:
        return [(step, text) for step, text in self.told if what in text]


class Steps(transformers.TrainerCallback):
    def __init__(self, caught: Caught) -> None:
        self.caught = caught

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.caught.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.caught.step = 99


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Any:
    caught = Caught()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", caught.show)
        yield caught


@pytest.mark.parametrize(
    ("monitor", "step", "near"),
    [
        ("eval_los", 2, "eval_loss"),
        ("val_effective_rank/last", 2, "eval_effective_rank/last"),
        ("eval_effective_rank/lsat", 2, "eval_effective_rank/last"),
        ("effective_rnak/last", 3, "effective_rank/last"),
        ("effective_rank/layer_07", 3, "effective_rank/last"),
        ("los", 1, "loss"),
        ("grad_nrom", 1, "grad_norm"),
        ("something else", 6, "loss"),
    ],
)
def test_a_name_that_is_not_logged_is_told_once_when_it_was_due(make_trainer, caught, monitor, step, near):
    watching = [of_transformers.PlateauStopping(monitor, **PLATEAU), of_transformers.CollapseAlarm(monitor)]
    trainer = make_trainer([Steps(caught), *watching, of_transformers.MatrixEntropyCallback(3)], **EVALUATION)
    trainer.train()
    found = caught.about(f"`monitor` {monitor!r} was never logged")
    assert len(found) == 2
    for when, text in found:
        assert min(when, 6) == step
        assert near in text.split("Near: ")[1]


def test_names_that_come_late_are_not_told(make_trainer, caught):
    later = [of_transformers.MatrixEntropyCallback(5, name="slow"), of_transformers.MatrixEntropyCallback(1)]
    keys = ("slow/effective_rank/last", "eval_second_loss", "eval_first_loss", "effective_rank/last", "loss")
    watching = [of_transformers.PlateauStopping(key, **PLATEAU) for key in keys]
    trainer = make_trainer([*watching, *later], **EVALUATION)
    trainer.eval_dataset = {name: text_examples(8, start=300) for name in ("first", "second")}
    trainer.train()
    assert not caught.about("never logged")


@pytest.mark.parametrize(
    ("monitor", "step", "near"),
    [
        ("val_scor", 2, "val_score"),
        ("val/score", 2, "val_score"),
        ("val_effective_rank/lsat", 2, "val_effective_rank/last"),
        ("effective_rnak/last", 3, "effective_rank/last"),
        ("train_los", 1, "train_loss"),
    ],
)
def test_in_lightning_too(make_lightning_trainer, make_lightning_module, caught, monitor, step, near):
    import lightning.pytorch as pl

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            caught.step = trainer.global_step

    module = make_lightning_module()
    module.validation_epoch_end = None
    step_of = type(module).training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        module.log("train_loss", 1.0)
        return step_of(module, batch, batch_idx)

    module.training_step = training_step
    module.on_validation_epoch_end = lambda: module.log("val_score", 1.0)
    watching = [of_lightning.PlateauStopping(monitor, **PLATEAU), of_lightning.CollapseAlarm(monitor)]
    callbacks = [Count(), *watching, of_lightning.MatrixEntropyCallback(3)]
    trainer = make_lightning_trainer(callbacks=callbacks, max_steps=8, val_check_interval=2)
    trainer.fit(module, loader(40), loader(8))
    found = caught.about("was never logged")
    assert len(found) == 2
    for when, text in found:
        assert step <= when <= step + 1
        assert near in text.split("Near: ")[1]


def test_an_interval_beyond_the_run_is_told_when_training_begins(
    make_trainer, make_lightning_trainer, make_lightning_module, caught
):
    probe = collate(text_examples(4, start=300))
    for arguments, what in (({}, "no step of it is measured"), ({"probe": probe}, "only its end is measured")):
        make_trainer([of_transformers.MatrixEntropyCallback(100, **arguments)]).train()
        callback = of_lightning.MatrixEntropyCallback(100, **arguments)
        make_lightning_trainer(callbacks=[callback], max_epochs=2, max_steps=-1).fit(
            make_lightning_module(), loader(24)
        )
        expected = [f"`every_n_steps` is 100, and training ends at step {last}: {what}." for last in (6, 12)]
        assert [text for _, text in caught.about("`every_n_steps`")] == expected
        caught.told.clear()
    make_trainer([of_transformers.MatrixEntropyCallback(6)]).train()
    assert not caught.about("`every_n_steps`")


def all_of(package: Any) -> list[Any]:
    return [
        package.MatrixEntropyCallback(),
        package.AlignmentCallback(),
        package.PlateauStopping("loss", **PLATEAU),
        package.CollapseAlarm(),
        *([package.ReadingPrinter()] if hasattr(package, "ReadingPrinter") else []),
    ]


@pytest.mark.parametrize("callback", all_of(of_lightning), ids=lambda callback: type(callback).__name__)
def test_the_hugging_face_trainer_refuses_a_callback_for_lightning(make_trainer, callback):
    name = type(callback).__name__
    match = (
        f"^This `{name}` is for Lightning's Trainer, and was given to Hugging Face's Trainer: "
        f"use `from matent_callbacks.transformers import {name}`.$"
    )
    with pytest.raises(TypeError, match=match):
        make_trainer([callback])
    trainer = make_trainer()
    trainer.add_callback(callback)
    for use in (trainer.train, trainer.evaluate):
        with pytest.raises(TypeError, match=match):
            use()


# Before, the Trainer itself refuses what is no callback of its package: "Expected a parent".
SAYS_IT = needs("lightning", "2.6")


@SAYS_IT
@BOTH_PACKAGES
@pytest.mark.parametrize("callback", all_of(of_transformers), ids=lambda callback: type(callback).__name__)
def test_the_lightning_trainer_refuses_a_callback_for_hugging_face(tmp_path, package, callback):
    name = type(callback).__name__
    advice = f"use `from matent_callbacks.lightning import {name}`" if name != "ReadingPrinter" else "there is none"
    match = f"^This `{name}` is for Hugging Face's Trainer, and was given to Lightning's Trainer: {advice}"
    with pytest.raises(TypeError, match=match):
        simple.make_trainer(tmp_path, [callback], package)
    with pytest.raises(TypeError, match=match):
        simple.make_trainer(tmp_path, [type(callback)], package)
    trainer = simple.make_trainer(tmp_path, [], package, max_steps=1)
    trainer.callbacks.append(callback)
    with pytest.raises(TypeError, match=match):
        trainer.fit(simple.make_module(package), simple.LOADER)


@SAYS_IT
@BOTH_PACKAGES
@pytest.mark.parametrize("name", of_lightning.__all__)
def test_lightning_says_so_for_a_class_in_place_of_an_object(tmp_path, package, name):
    with pytest.raises(TypeError, match=rf"`callbacks` needs an object, `{name}\(...\)`, got the class `{name}`"):
        simple.make_trainer(tmp_path, [getattr(of_lightning, name)], package)


def test_the_hugging_face_trainer_makes_an_object_of_a_class_where_it_can(make_trainer):
    kinds = [of_transformers.MatrixEntropyCallback, of_transformers.CollapseAlarm, of_transformers.ReadingPrinter]
    trainer = make_trainer(kinds, max_steps=100)
    trainer.train()
    assert "effective_rank/last" in {key for record in trainer.state.log_history for key in record}
    with pytest.raises(TypeError, match=r"`PlateauStopping` needs arguments: pass an object, .*, not the class"):
        make_trainer([of_transformers.PlateauStopping])


@pytest.mark.parametrize("package", [of_transformers, of_lightning])
def test_callbacks_can_still_be_copied_and_pickled(package):
    for callback in all_of(package):
        assert copy.deepcopy(callback).state_key == callback.state_key
        assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
