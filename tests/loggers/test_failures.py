"""A logger that fails, and one that knows nothing of pictures: the others have theirs, and training is the same."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.lightning import MatrixEntropyCallback as LightningCallback
from matent_callbacks.lightning._trainer import summarize_by_maximum, takes_pictures
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.loggers.libraries import PICTURES, TensorBoard, Wandb, in_csv
from tests.versions import BOTH_PACKAGES


def unreachable(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no route to host")


def assert_same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "Training goes on" in str(warning.message)]


@pytest.fixture
def wandb_without_images(monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "Image", unreachable)


def test_a_reporter_without_its_image_call_keeps_nothing_from_the_next(prepare, make_trainer, wandb_without_images):
    wandb, tensorboard = prepare(Wandb), prepare(TensorBoard)
    settings = {"max_steps": 6, "report_to": ["wandb", "tensorboard"]}
    trainer = make_trainer([MatrixEntropyCallback(2, layers="all")], **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    wandb.finish()
    (text,) = told(caught)
    assert "WandbCallback did not take the pictures: no route to host" in text
    assert [list(tensorboard.stored().pictures[name]) for name in PICTURES] == [[4, 6]] * 2
    for library in (wandb, tensorboard):
        assert list(library.stored().numbers["train/effective_rank/last"]) == [2, 4, 6]

    plain = make_trainer(max_steps=6)
    plain.train()
    assert_same(trainer.model.state_dict(), plain.model.state_dict())


def test_of_two_that_fail_each_is_told_once_or_else_raised(prepare, make_trainer, wandb_without_images, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "add_image", unreachable)
    settings = {"max_steps": 6, "report_to": ["wandb", "tensorboard"]}
    prepare(Wandb)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer([MatrixEntropyCallback(1, layers="all")], **settings).train()
    kinds = [text.partition(" did not take the pictures: no route to host")[0] for text in told(caught)]
    assert kinds == ["WandbCallback", "TensorBoardCallback"]
    with pytest.raises(OSError, match="no route to host"):
        make_trainer([MatrixEntropyCallback(1, layers="all", on_error="raise")], **settings).train()


@BOTH_PACKAGES
def test_a_logger_without_its_image_call_keeps_nothing_from_the_next(package, prepare, fit, wandb_without_images):
    wandb, tensorboard = prepare(Wandb), prepare(TensorBoard)
    loggers = [wandb.make_logger(package), tensorboard.make_logger(package)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = fit(package, loggers, [LightningCallback(2, layers="all")])
    wandb.finish()
    (text,) = told(caught)
    assert "WandbLogger did not take the pictures: no route to host" in text
    assert [list(tensorboard.stored().pictures[name]) for name in PICTURES] == [[3, 5, 7]] * 2
    for library in (wandb, tensorboard):
        assert list(library.stored().numbers["effective_rank/last"]) == [1, 3, 5, 7]
    assert_same(weights, fit(package, [], []))


def own_logger(package: str = "lightning.pytorch", **attributes: Any) -> Any:
    """A logger as in Lightning's manual, which has no `experiment`."""

    class Own(importlib.import_module(f"{package}.loggers.logger").Logger):
        name, version = "own", 0

        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.rows.append((step, metrics))

    for name, value in attributes.items():
        setattr(Own, name, value)
    return Own()


@BOTH_PACKAGES
def test_loggers_of_ones_own_get_the_numbers(package, prepare, fit, tmp_path):
    tensorboard = prepare(TensorBoard)
    broken, own = own_logger(package, log_metrics=unreachable), own_logger(package)
    others = importlib.import_module(f"{package}.loggers").CSVLogger(tmp_path / "csv")
    loggers = [broken, own, others, tensorboard.make_logger(package)]
    with pytest.warns(UserWarning, match="Own did not take the readings: no route to host. Training goes on"):
        weights = fit(package, loggers, [LightningCallback(2, layers="all")])
    assert [step for step, row in own.rows if "effective_rank/last" in row] == [1, 3, 5, 7]
    assert list(in_csv(tmp_path / "csv", "effective_rank/last")) == [1, 3, 5, 7]
    assert list(tensorboard.stored().pictures[PICTURES[0]]) == [3, 5, 7]
    assert_same(weights, fit(package, [], []))


def test_what_wandb_sums_up_is_nothing_to_other_loggers():
    import lightning.pytorch as pl

    def trainer(**attributes: Any) -> Any:
        return pl.Trainer(logger=own_logger(**attributes), accelerator="cpu", enable_checkpointing=False)

    guard = Guard("AlignmentCallback", "warn")
    summarize_by_maximum(trainer(), guard, "alignment/image_text")
    assert not takes_pictures(trainer())
    broken = trainer(experiment=property(unreachable))
    assert not takes_pictures(broken)
    with pytest.warns(UserWarning, match="no route to host Training goes on without the greatest values .* of Own"):
        summarize_by_maximum(broken, guard, "alignment/image_text")


def test_a_reporter_of_ones_own_gets_the_numbers_and_nothing_is_drawn_for_it(make_trainer, drawn):
    class Reporter(TrainerCallback):
        rows: list[tuple[int, dict[str, float]]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.rows.append((state.global_step, dict(logs)))

    reporter = Reporter()
    make_trainer([reporter, MatrixEntropyCallback(2, layers="all")], max_steps=6).train()
    assert [step for step, logs in reporter.rows if "effective_rank/last" in logs] == [2, 4, 6]
    assert not drawn


def test_none_of_the_libraries_is_imported_with_the_package():
    code = "import sys, matent_callbacks.callbacks.loggers, matent_callbacks.monitor; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"wandb", "tensorboard", "mlflow", "comet_ml", "trackio", "PIL"}.intersection(loaded)
