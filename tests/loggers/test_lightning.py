"""What reaches the loggers of Lightning."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matent_callbacks.lightning import MatrixEntropyCallback
from tests.conftest import collate, text_examples
from tests.loggers.libraries import ALL
from tests.loggers.test_huggingface import PICTURES

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture
def fit(make_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Eight steps of a small Llama; what its weights are then."""

    def train(package: str, loggers: list[Any], callbacks: list[Any]) -> dict[str, torch.Tensor]:
        pl = importlib.import_module(package)

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = make_llama()

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                return self.model(**batch).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        module = Module()
        trainer = pl.Trainer(
            max_steps=8,
            logger=loggers,
            callbacks=callbacks,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(text_examples(32), batch_size=4, collate_fn=collate))
        return module.state_dict()

    return train


def in_csv(folder: Path, key: str) -> dict[int, float]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.logger])
def test_numbers_and_pictures_are_stored_under_their_steps(kind, package, prepare, fit, drawn, tmp_path):
    library = prepare(kind)
    others = importlib.import_module(f"{package}.loggers").CSVLogger(tmp_path / "csv")
    fit(package, [others, library.make_logger(package)], [MatrixEntropyCallback(2, layers="all")])
    library.finish()
    stored = library.stored()

    for layer in ("layer_00", "layer_01", "layer_02", "last"):
        logged = in_csv(tmp_path / "csv", f"matrix_entropy/{layer}")
        # Lightning counts from 0.
        assert sorted(logged) == [1, 3, 5, 7]
        assert stored.numbers[f"matrix_entropy/{layer}"] == {step: pytest.approx(v) for step, v in logged.items()}

    assert sorted(stored.pictures) == PICTURES
    for name in PICTURES:
        assert list(stored.pictures[name]) == [3, 5, 7]
        for seen, pictures in zip(stored.pictures[name].values(), drawn, strict=True):
            np.testing.assert_array_equal(seen, pictures[name])
