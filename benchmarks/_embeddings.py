"""Embeddings in Lightning, with RankMe of either package."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from matent_callbacks.lightning import MatrixEntropyCallback


class Embeddings(pl.LightningModule):  # type: ignore[misc]
    """Outputs embeddings whose spectrum falls as a power law, as those of trained models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(width, width)
        self.callbacks_modules = nn.ModuleDict()  # where stable-pretraining keeps its queues
        with torch.no_grad():
            self.encoder.weight.mul_(torch.arange(1, width + 1).pow(-0.5).unsqueeze(1))

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        embedding = self.encoder(batch["x"])
        return {"loss": embedding.square().mean(), "embedding": embedding.detach()}

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), lr=0.0)


def fit(name: str, data: list[dict[str, Tensor]], width: int, values: dict[str, float]) -> None:
    """One optimizer step over all batches, then one batch of validation."""
    callbacks: list[Any] = []
    if name == "ours":
        callbacks = [MatrixEntropyCallback(1, "encoder", metrics="rankme", during_eval=False, on_error="raise")]
    elif name == "theirs":
        rankme = importlib.import_module("stable_pretraining.callbacks.rankme")
        callbacks = [rankme.RankMe("theirs", "embedding", len(data) * len(data[0]["x"]), width, verbose=False)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            max_epochs=1,
            accumulate_grad_batches=len(data),
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        # Without those that stable-pretraining adds.
        trainer.callbacks = callbacks
        trainer.fit(Embeddings(width), loader(data), loader(data[:1]))
    key = {"ours": "rankme/encoder", "theirs": "theirs"}.get(name)
    if key is not None:
        values[name] = float(trainer.callback_metrics[key])


def loader(data: list[dict[str, Tensor]]) -> Any:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]
