"""Alignment in Lightning, on a small CLIP and a small LLaVA."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import measure_alignment
from matent_callbacks.lightning import AlignmentCallback
from tests.pairs import clip_examples, collate_pairs, llava_examples, make_clip, make_llava
from tests.versions import BOTH_PACKAGES, needs


def loader(examples: list[Any]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(examples, batch_size=4, collate_fn=collate_pairs)


def fit(
    folder: Path,
    model: Any,
    examples: list[Any],
    callbacks: list[Any],
    package: str = "lightning.pytorch",
    logger: Any = False,
) -> Any:
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.model(**batch, **({} if "labels" in batch else {"return_loss": True})).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=4,
        val_check_interval=2,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    module = Module()
    torch.manual_seed(1)
    trainer.fit(module, loader(examples), loader(examples[:16]))
    return trainer, module


@BOTH_PACKAGES
@pytest.mark.parametrize(
    ("make", "examples", "key"),
    [
        (make_clip, clip_examples, "alignment/cka"),
        pytest.param(make_llava, llava_examples, "alignment/image_text", marks=needs("transformers", "5.0")),
    ],
)
def test_values_are_those_of_the_model_after_the_step(tmp_path, package, make, examples, key):
    trainer, module = fit(tmp_path, make(), examples(32), [AlignmentCallback(2, k=4)], package)
    values = {k: v.item() for k, v in trainer.callback_metrics.items()}
    probe = collate_pairs(examples(16))
    expected = measure_alignment(module.model, probe, k=4)
    assert key in expected
    assert {k: values[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert {k: values[f"val_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)


@needs("transformers", "5.0")
def test_training_is_bitwise_the_same(tmp_path):
    _, module = fit(tmp_path, make_llava(), llava_examples(32), [])
    _, watched = fit(tmp_path, make_llava(), llava_examples(32), [AlignmentCallback(1, on_error="raise")])
    assert len(module.losses) == 4
    assert watched.losses == module.losses
    assert all(torch.equal(v, watched.state_dict()[k]) for k, v in module.state_dict().items())


@needs("transformers", "5.0")
def test_a_probe_that_cannot_be_read_is_told_when_training_begins(tmp_path):
    probe = {k: v for k, v in collate_pairs(llava_examples(4)).items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="`pixel_values` must be in the batch"):
        fit(tmp_path, make_llava(), llava_examples(8), [AlignmentCallback(1, probe=probe)])


@needs("transformers", "5.0")
def test_wandb_sums_the_alignment_up_by_its_greatest_value_and_its_last(tmp_path, own_wandb):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer, _ = fit(tmp_path, make_llava(), llava_examples(32), [AlignmentCallback(1)], logger=logger)
    for key in ("alignment/image_text", "alignment/grounding", "alignment/cka_z", "alignment/mutual_knn_z"):
        summary = wandb.run.summary[key]
        assert summary["last"] == pytest.approx(trainer.callback_metrics[key].item())
        assert summary["max"] >= summary["last"]
    wandb.finish()
