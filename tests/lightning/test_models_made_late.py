"""LightningModules that make their model after ``__init__``, or replace it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from matent_callbacks.lightning import AlignmentCallback, MatrixEntropyCallback, PlateauStopping
from tests.conftest import collate, llama, text_examples
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.versions import BOTH_PACKAGES

KEY = "matrix_entropy/last"
PLACES = ("__init__", "setup", "configure_model", "on_fit_start")


def loader(count: int, *, start: int = 0) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(text_examples(count, start=start), batch_size=4, collate_fn=collate)


def make_llama() -> Any:
    # Without dropout: making a model and beginning to evaluate draw random numbers, too.
    return llama(dropout=0.0)


def make_module(place: str, *, make: Any = make_llama, package: str = "lightning.pytorch") -> Any:
    """A LightningModule that makes its model in one of its hooks."""
    base = importlib.import_module(package).LightningModule

    class Module(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None
            self.scale = nn.Parameter(torch.ones(()))
            self.losses: list[float] = []
            self._make("__init__")

        def _make(self, now: str) -> None:
            if now == place and self.model is None:
                self.model = make()

        def setup(self, stage: str) -> None:
            self._make("setup")

        def configure_model(self) -> None:
            self._make("configure_model")

        def on_fit_start(self) -> None:
            self._make("on_fit_start")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.scale * self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, *args: Any) -> None:
            self.log("val_loss", self.model(**args[0]).loss)

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


def make_trainer(callbacks: list[Any], folder: Path, *, package: str = "lightning.pytorch", **arguments: Any) -> Any:
    settings = {"max_steps": 6, "val_check_interval": 3, "enable_checkpointing": False, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = importlib.import_module(package).Trainer
    return trainer(callbacks=callbacks, default_root_dir=folder, **{**settings, **quiet, **arguments})


def fit(place: str, callbacks: list[Any], folder: Path, **arguments: Any) -> tuple[Any, Any]:
    module = make_module(place)
    trainer = make_trainer(callbacks, folder, **arguments)
    torch.manual_seed(1)
    trainer.fit(module, loader(40), loader(8, start=100))
    return module, trainer


def numbers(trainer: Any) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("probed", [False, True])
def test_readings_are_those_of_a_model_from_init(probed, tmp_path):
    batch = collate(text_examples(4, start=200))
    arguments = {"probe": batch, "reference": "start"} if probed else {}

    def run(place: str) -> tuple[list[float], dict[str, float]]:
        checkpoint = ModelCheckpoint(tmp_path / place, monitor=f"val_{KEY}")
        stopping = PlateauStopping(KEY, min_delta=0.1, patience=3)
        callbacks = [MatrixEntropyCallback(2, "all", **arguments), stopping, checkpoint]
        module, trainer = fit(place, callbacks, tmp_path, enable_checkpointing=True)
        assert checkpoint.best_model_score is not None
        return module.losses, numbers(trainer)

    losses, wanted = run("__init__")
    assert {KEY, f"val_{KEY}", "effective_rank/layer_01", f"plateau/{KEY}"} <= set(wanted)
    assert ("diff_erank/last" in wanted) == probed
    for place in ("setup", "configure_model"):
        assert run(place) == (losses, wanted)


@BOTH_PACKAGES
@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_layer_raises_before_training(place, package, tmp_path):
    for checked in (0, 2):
        module = make_module(place, package=package)
        callback = MatrixEntropyCallback(2, layers="model.layers.1.mpl")
        trainer = make_trainer([callback], tmp_path, package=package, num_sanity_val_steps=checked)
        with pytest.raises(ValueError, match=r"Near matches: .*model\.layers\.1\.mlp"):
            trainer.fit(module, loader(40), loader(8))
        assert not module.losses


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_alone(stage, place, tmp_path):
    module = make_module(place)
    trainer = make_trainer([MatrixEntropyCallback(2)], tmp_path)
    getattr(trainer, stage)(module, loader(8, start=100), verbose=False)
    monitor = EntropyMonitor(module.model)
    module.eval()
    with monitor, torch.no_grad():
        for batch in loader(8, start=100):
            module.model(**batch)
    key = f"{'val' if stage == 'validate' else 'test'}_{KEY}"
    assert numbers(trainer)[key] == pytest.approx(monitor.compute()[KEY], rel=1e-6)
    wrong = make_trainer([MatrixEntropyCallback(2, layers="lsat")], tmp_path)
    with pytest.raises(ValueError, match="Near matches: last"):
        getattr(wrong, stage)(make_module(place), loader(8), verbose=False)


@pytest.mark.parametrize("place", PLACES)
def test_two_callbacks_of_the_same_names_raise_before_training(place, tmp_path):
    module = make_module(place)
    trainer = make_trainer([MatrixEntropyCallback(2), MatrixEntropyCallback(3, layers=-1)], tmp_path)
    with pytest.raises(ValueError, match="Two callbacks would log 'effective_rank/last'"):
        trainer.fit(module, loader(40), loader(8))
    assert not module.losses


def test_callbacks_of_the_module_itself(tmp_path):
    class Configured(type(make_module("setup"))):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return MatrixEntropyCallback(2)

        def setup(self, stage: str) -> None:
            self.model = self.model or llama()

    trainer = make_trainer([], tmp_path)
    trainer.fit(Configured(), loader(40), loader(8))
    assert {KEY, f"val_{KEY}"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("probed", [False, True])
def test_a_model_that_is_replaced_is_read_itself(probed, tmp_path):
    """Between a fit and a test, between two fits, and in the middle of a run."""
    batch = collate(text_examples(4, start=200))

    def expected(model: nn.Module) -> float:
        monitor = EntropyMonitor(model)
        monitor.read(batch)
        return monitor.compute()[KEY]

    callback = MatrixEntropyCallback(2, probe=batch if probed else None)
    module, trainer = fit("setup", [callback], tmp_path)
    module.model = llama(layers=1, hidden=16, seed=5)
    trainer.test(module, loader(4, start=200), verbose=False)
    assert numbers(trainer)[f"test_{KEY}"] == pytest.approx(expected(module.model), rel=1e-5)

    trainer = make_trainer([callback], tmp_path, limit_val_batches=0)
    trainer.fit(module, loader(40))
    assert KEY in numbers(trainer)
    if probed:
        assert numbers(trainer)[KEY] == pytest.approx(expected(module.model), rel=1e-5)

    class Replacing(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.model = llama(layers=1, hidden=16, seed=7)

    with_epochs = {"max_steps": -1, "max_epochs": 2, "limit_val_batches": 0, "val_check_interval": None}
    module, trainer = fit("setup", [Replacing(), callback], tmp_path, **with_epochs)
    assert numbers(trainer)["effective_rank/last"] <= 16
    if probed:
        assert numbers(trainer)[KEY] == pytest.approx(expected(module.model), rel=1e-5)


def test_a_module_that_is_compiled_as_a_whole_is_told_once(tmp_path, recwarn):
    module = make_module("configure_model")
    module.compile()
    module._compiler_ctx = {"compiler": "dynamo"}
    trainer = make_trainer([MatrixEntropyCallback(2)], tmp_path)
    trainer.fit(module, loader(40), loader(8))
    assert len([w for w in recwarn if "compiled as a whole" in str(w.message)]) == 1
    assert KEY not in trainer.callback_metrics


@pytest.mark.parametrize("place", ["setup", "configure_model"])
def test_alignment_of_a_model_that_is_made_late(place, tmp_path):
    values = {}
    for where in ("__init__", place):
        module = make_module(where, make=make_clip)
        data = torch.utils.data.DataLoader(
            clip_examples(16), batch_size=8, collate_fn=lambda e: {**collate_pairs(e), "return_loss": True}
        )
        trainer = make_trainer([AlignmentCallback(1, num_pairs=12)], tmp_path, max_steps=2, val_check_interval=1)
        torch.manual_seed(1)
        trainer.fit(module, data, data)
        values[where] = numbers(trainer)
    assert {"alignment/cka", "val_alignment/cka"} <= set(values[place])
    assert values[place] == values["__init__"]


def test_an_evaluation_inside_a_window_changes_no_reading(tmp_path):
    def run(**arguments: Any) -> float:
        callback = MatrixEntropyCallback(6, metrics="embedding_rankme", window_steps=6)
        _, trainer = fit("__init__", [callback], tmp_path, **arguments)
        return numbers(trainer)["embedding_rankme/last"]

    wanted = run(limit_val_batches=0, val_check_interval=None)
    assert run(val_check_interval=2) == run(val_check_interval=1) == wanted
