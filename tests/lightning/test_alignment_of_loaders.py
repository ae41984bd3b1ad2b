"""Alignment of the first pairs of Lightning's loaders, whatever they are nested in, where no probe was given."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, random_split

from matent_callbacks import measure_alignment
from matent_callbacks.lightning import AlignmentCallback
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.versions import BOTH_PACKAGES

EXAMPLES = clip_examples(64)
X, Y, TRAIN = EXAMPLES[3:23], EXAMPLES[30:50], EXAMPLES[50:]
KEY = "alignment/modality_gap"


def loader(examples: Any) -> Any:
    return DataLoader(examples, batch_size=4, collate_fn=collate_pairs)


def of(examples: Any) -> float:
    return measure_alignment(make_clip(), collate_pairs(list(examples)[:16]), k=4)[KEY]


def make_module(package: str = "lightning.pytorch", rate: float = 0.0) -> Any:
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_clip()
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            batch = batch.get("pairs", batch)
            loss = self.model(**batch, return_loss=True).loss + 0 * torch.rand(())
            self.losses.append(loss.item() + torch.rand(()).item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=rate)

    return Module()


def make_trainer(folder: Path, callbacks: list[Any], package: str = "lightning.pytorch", **settings: Any) -> Any:
    pl = importlib.import_module(package)
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **{"max_epochs": 2, **settings},
    )


def logged(trainer: Any) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items() if KEY in key}


def nested(kind: str, package: str) -> Any:
    combined = importlib.import_module(f"{package}.utilities").CombinedLoader
    x, y = loader(X), loader(Y)
    return {
        "one": x,
        "list": [x, y],
        "tuple": (x, y),
        "dict": {"a": x, "b": y},
        "nested": {"a": [x], "b": {"c": y}},
        "combined": combined({"a": x, "b": y}, "sequential"),
    }[kind]


@BOTH_PACKAGES
@pytest.mark.parametrize("kind", ["one", "list", "tuple", "dict", "nested", "combined"])
def test_each_loader_is_measured_on_its_own_pairs_and_training_on_the_first(tmp_path, package, kind):
    trainer = make_trainer(tmp_path, [AlignmentCallback(1, k=4, on_error="raise")], package, max_epochs=1)
    trainer.fit(make_module(package), loader(TRAIN), nested(kind, package))
    of_sets = {"": of(X)} if kind == "one" else {"/dataloader_idx_0": of(X), "/dataloader_idx_1": of(Y)}
    expected = {KEY: of(X), **{f"val_{KEY}{suffix}": value for suffix, value in of_sets.items()}}
    assert logged(trainer) == pytest.approx(expected, abs=1e-5)


def test_other_data_after_the_fit_are_measured_as_they_are(tmp_path):
    callback, module = AlignmentCallback(1, k=4, on_error="raise"), make_module()
    trainer = make_trainer(tmp_path, [callback])
    trainer.fit(module, loader(TRAIN), loader(X))
    (tested,) = trainer.test(module, loader(Y), verbose=False)
    assert tested[f"test_{KEY}"] == pytest.approx(of(Y), abs=1e-5)
    (validated,) = trainer.validate(module, loader(TRAIN), verbose=False)
    assert validated[f"val_{KEY}"] == pytest.approx(of(TRAIN), abs=1e-5)
    # In another run training is measured on the data of that run.
    trainer = make_trainer(tmp_path, [callback])
    trainer.fit(module, loader(TRAIN), loader(Y))
    assert logged(trainer) == pytest.approx({KEY: of(Y), f"val_{KEY}": of(Y)}, abs=1e-5)


def test_a_probe_of_the_users_is_measured_once_whatever_is_evaluated(tmp_path):
    callback = AlignmentCallback(1, k=4, probe=collate_pairs(TRAIN[:14]))
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(make_module(), loader(TRAIN), [loader(X), loader(Y)])
    assert logged(trainer) == pytest.approx({KEY: of(TRAIN), f"val_{KEY}": of(TRAIN)}, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}])
def test_training_pairs_from_a_mapping_of_loaders_where_there_is_no_validation(tmp_path, settings):
    from lightning.pytorch.utilities import CombinedLoader

    trainer = make_trainer(tmp_path, [AlignmentCallback(1, k=4, on_error="raise")], max_epochs=1, **settings)
    validated = loader(X) if settings else None
    trainer.fit(make_module(), CombinedLoader({"pairs": loader(TRAIN)}), validated)
    assert logged(trainer) == pytest.approx({KEY: of(TRAIN)}, abs=1e-5)


def with_hook(draws: bool, calls: list[int]) -> Any:
    module = make_module(rate=0.1)

    def val_dataloader() -> Any:
        calls.append(module.trainer.current_epoch)
        return loader(random_split(X, [18, 2])[0] if draws else X)

    type(module).val_dataloader = lambda self: val_dataloader()
    return module


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("draws", [False, True])
def test_validation_pairs_are_found_before_the_first_validation_without_changing_the_run(tmp_path, epochs, draws):
    def run(callbacks: list[Any]) -> tuple[Any, Any, list[int]]:
        calls: list[int] = []
        module = with_hook(draws, calls)
        trainer = make_trainer(
            tmp_path, callbacks, max_epochs=4, num_sanity_val_steps=0, check_val_every_n_epoch=epochs
        )
        torch.manual_seed(5)
        trainer.fit(module, DataLoader(TRAIN, batch_size=4, collate_fn=collate_pairs, shuffle=True))
        return trainer, module, calls

    _, module, calls = run([])
    trainer, watched, calls_with = run([AlignmentCallback(1, k=4, on_error="raise")])
    assert module.losses == watched.losses
    assert all(torch.equal(v, watched.state_dict()[k]) for k, v in module.state_dict().items())
    # Only a hook that draws random numbers is called once more: drawn early, they would be others.
    assert len(calls_with) == len(calls) + (draws and epochs == 2)
    if not draws:
        expected = measure_alignment(watched.model, collate_pairs(X[:16]), k=4)[KEY]
        assert logged(trainer) == pytest.approx({KEY: expected, f"val_{KEY}": expected}, abs=1e-5)


def test_loaders_that_were_passed_are_used_before_the_first_validation(tmp_path):
    trainer = make_trainer(
        tmp_path, [AlignmentCallback(1, k=4)], num_sanity_val_steps=0, check_val_every_n_epoch=2, max_epochs=1
    )
    trainer.fit(make_module(), loader(TRAIN), {"a": loader(X), "b": loader(Y)})
    assert logged(trainer) == pytest.approx({KEY: of(X)}, abs=1e-5)


def test_a_loader_of_batches_gives_as_many_as_hold_the_pairs(tmp_path):
    batches = [collate_pairs(X[i : i + 5]) for i in range(0, 20, 5)]
    callback = AlignmentCallback(1, k=4, num_pairs=12, on_error="raise")
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(make_module(), loader(TRAIN), DataLoader(batches, batch_size=None))
    expected = measure_alignment(make_clip(), batches[:3], k=4)[KEY]
    assert expected != pytest.approx(measure_alignment(make_clip(), batches, k=4)[KEY], abs=1e-5)
    assert logged(trainer) == pytest.approx({KEY: expected, f"val_{KEY}": expected}, abs=1e-5)


class Batches:
    """An iterable of batches that says nothing of its data."""

    def __iter__(self) -> Any:
        return iter([collate_pairs(Y[:4])])


def test_loaders_that_cannot_be_used_are_told_with_a_way_out(tmp_path):
    trainer = make_trainer(tmp_path, [AlignmentCallback(1, k=4)])
    with pytest.raises(ValueError, match=r"`probe` must be given.*`dataset` and `collate_fn`.*got Batches"):
        trainer.fit(make_module(), loader(TRAIN), Batches())
    trainer = make_trainer(tmp_path, [AlignmentCallback(1, k=4)], max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(), loader(TRAIN), [loader(X), Batches()])
    expected = {KEY: of(X), f"val_{KEY}/dataloader_idx_0": of(X)}
    assert logged(trainer) == pytest.approx(expected, abs=1e-5)
    (told,) = (str(w.message) for w in caught if "Monitoring failed" in str(w.message))
    assert "`probe` must be given" in told
