"""Pretrain a small Llama in PyTorch Lightning, and stop when the entropy of its last layer has settled.

python examples/pretrain_lightning.py                     # the text that ships with CPython
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from pretrain_text import LENGTH, VOCABULARY, shipped_text, tokenize
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from matent_callbacks.lightning import MatrixEntropyCallback, PlateauStopping


class LanguageModel(pl.LightningModule):  # type: ignore[misc]
    """A Hugging Face model in a LightningModule; it knows nothing of the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / 250))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="text files; none: the English text that ships with CPython")
    parser.add_argument("--steps", type=int, default=500, help="at most")
    parser.add_argument("--every", type=int, default=10, help="steps between two readings and two validations")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain_lightning"))
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    documents = [path.read_text(encoding="utf-8") for path in arguments.text] or list(shipped_text())
    sequences = tokenize(documents)
    held_out, train = sequences[::20][:32], [s for i, s in enumerate(sequences) if i % 20]

    torch.manual_seed(0)
    entropy = MatrixEntropyCallback(
        arguments.every,
        layers="all",
        probe=default_data_collator(held_out),
        reference="start",
    )
    stopping = PlateauStopping("val_matrix_entropy/last", min_delta=0.1, patience=6, mode="any")
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        val_check_interval=arguments.every,
        check_val_every_n_epoch=None,
        callbacks=[entropy, stopping],
        logger=[
            CSVLogger(arguments.output),
            WandbLogger(project="matent_callbacks", save_dir=arguments.output),
        ],
        log_every_n_steps=arguments.every,
        enable_checkpointing=False,
        accelerator="auto",
    )
    trainer.fit(LanguageModel(), loader(train, shuffle=True), loader(held_out, shuffle=False))

    print(f"\nAfter {trainer.global_step} steps, on held-out text:")
    for key in ("val_loss", "val_matrix_entropy/last", "val_effective_rank/last", "diff_erank/last"):
        print(f"  {key:26} {trainer.callback_metrics[key]:8.3f}")
    print(f"Curves: {arguments.output}/lightning_logs, and wandb sync {arguments.output}/wandb/latest-run")


def loader(sequences: list[dict[str, Any]], *, shuffle: bool) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(
        sequences,  # type: ignore[arg-type]
        batch_size=16,
        shuffle=shuffle,
        collate_fn=default_data_collator,
        drop_last=shuffle,
    )


if __name__ == "__main__":
    main()
