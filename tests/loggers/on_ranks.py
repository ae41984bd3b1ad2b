"""What each of two processes does whose user has opened a W&B run on both of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.reading import as_if_launched


def train(rank: int, world_size: int, folder: str, framework: str) -> tuple[float, list[str]]:
    """A value that all ranks log, and the pictures that this rank has stored."""
    import wandb

    as_if_launched(rank, world_size)
    own = Path(folder) / str(rank)
    own.mkdir()
    wandb.init(mode="offline", dir=own)
    value = {"transformers": with_transformers, "lightning": with_lightning}[framework](own, world_size)
    wandb.finish()
    return value, sorted(path.name.rpartition("_")[0] for path in own.rglob("*.png"))


def with_transformers(folder: Path, world_size: int) -> float:
    from matent_callbacks.transformers import MatrixEntropyCallback
    from tests.distributed.trainer_on_ranks import make_trainer

    callbacks: list[Any] = [MatrixEntropyCallback(2, layers="all")]
    trainer = make_trainer(str(folder), callbacks, report_to=["wandb", "tensorboard"])
    trainer.train()
    return next(r["effective_rank/last"] for r in trainer.state.log_history if r["step"] == 4)


def with_lightning(folder: Path, world_size: int) -> float:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    from matent_callbacks.lightning import MatrixEntropyCallback
    from tests.distributed.lightning_on_ranks import Module, loader, make_trainer

    loggers = [WandbLogger(save_dir=folder, offline=True), TensorBoardLogger(folder)]
    trainer = make_trainer(str(folder), world_size, [MatrixEntropyCallback(2, layers="all")], logger=loggers)
    trainer.fit(Module(), loader(32))
    return float(trainer.callback_metrics["effective_rank/last"])
