"""What each process does that evaluates several sets of pairs without a probe."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from matent_callbacks.lightning import AlignmentCallback as LightningAlignment
from matent_callbacks.transformers import AlignmentCallback
from tests.distributed.reading import as_if_launched
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.transformers.test_alignment_of_evaluations import KEY, Clip

NUM_PAIRS = 13
SETS = {"x": clip_examples(64)[3:23], "y": clip_examples(64)[30:50], "z": clip_examples(64)[40:60]}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The pairs of ``y`` cannot be found on the last rank."""
    as_if_launched(rank, world_size)
    in_parts = dist.new_group(list(range(world_size)))
    found = {}
    for name, group in (("whole", None), ("in parts", in_parts)):
        reads: list[str] = []

        def collate(examples: list[Any], reads: list[str] = reads) -> Any:
            if len(examples) == NUM_PAIRS:
                reads.append("pairs")
                if rank == world_size - 1 and examples[0] is SETS["y"][0]:
                    raise OSError("boom")
            return collate_pairs(examples)

        callback = AlignmentCallback(1, k=4, num_pairs=NUM_PAIRS, context_group=group)
        trainer = Clip(
            model=make_clip(),
            args=TrainingArguments(
                f"{folder}/{name}",
                max_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                learning_rate=0.0,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=clip_examples(32),
            eval_dataset=SETS,
            data_collator=collate,
            callbacks=[callback],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        records = trainer.state.log_history
        values = {key: value for record in records for key, value in record.items() if key.endswith(KEY)}
        told = [str(w.message) for w in caught if "Monitoring failed" in str(w.message)]
        found[name] = {"values": values, "told": told, "reads": len(reads)}
    return found


class Module(pl.LightningModule):
    """One whose hook for validation data draws random numbers on some ranks."""

    def __init__(self, drawing: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.drawing, self.calls = make_clip(), drawing, 0
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch, return_loss=True).loss
        self.losses.append(loss.item() + torch.rand(()).item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def val_dataloader(self) -> Any:
        self.calls += 1
        if self.trainer.global_rank in self.drawing:
            torch.rand(())
        return DataLoader(SETS["x"], batch_size=4, collate_fn=collate_pairs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def on_rank_of_lightning(rank: int, world_size: int, folder: str) -> list[Any]:
    """The first validation is long after the first reading."""
    as_if_launched(rank, world_size)
    found = []
    for drawing in ((), (1,)):
        runs = []
        for callbacks in ([], [LightningAlignment(1, k=4, num_pairs=NUM_PAIRS, on_error="raise")]):
            trainer = pl.Trainer(
                default_root_dir=folder,
                strategy="ddp",
                accelerator="cpu",
                devices=world_size,
                plugins=[LightningEnvironment()],
                max_epochs=2,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=2,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            torch.manual_seed(7)
            module = Module(drawing)
            trainer.fit(module, DataLoader(clip_examples(16), batch_size=4, collate_fn=collate_pairs))
            values = {key: value.item() for key, value in trainer.callback_metrics.items() if key.endswith(KEY)}
            runs.append((module.losses, module.calls, values))
        found.append(runs)
    return found
