"""What each process of the Lightning tests does."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from matent_callbacks.lightning import MatrixEntropyCallback, PlateauStopping
from tests.conftest import VOCABULARY, collate, text_examples
from tests.distributed.reading import as_if_launched, record_forwards, small_llama

# One rank with nothing new, some ranks with a part, all even.
EVALUATION_SIZES = (3, 13, 16)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_llama()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.model(**batch)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class MadeLate(Module):
    """Makes its model where FSDP and large models need it."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = small_llama()
        if self.device_mesh is not None:
            for block in (*self.model.model.layers, self.model):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


class Kept(pl.Callback):
    """The value of each optimizer step."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.key in trainer.callback_metrics:
            self.values[trainer.global_step] = float(trainer.callback_metrics[self.key])


def loader(count: int, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(text_examples(count), batch_size=4, collate_fn=collate, shuffle=shuffle)


def make_trainer(folder: str, world_size: int, callbacks: list[Any], **arguments: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "strategy": "ddp",
        "accelerator": "cpu",
        "devices": world_size,
        "plugins": [LightningEnvironment()],
        "max_steps": 4,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callbacks, **{**settings, **arguments})


def train_and_evaluate(folder: str, world_size: int) -> dict[str, Any]:
    """Readings of training steps with what was read, and of evaluations over loaders whose end is uneven."""
    module, kept = Module(), Kept("matrix_entropy/layer_00")
    callback = MatrixEntropyCallback(2, layers="all")
    trainer = make_trainer(folder, world_size, [callback, kept])
    seen = record_forwards(module.model)
    trainer.fit(module, loader(16 * world_size))
    steps = dict(kept.values)
    evaluating = make_trainer(folder, world_size, [MatrixEntropyCallback(1, layers="all")])
    [*_, validated] = evaluating.validate(module, [loader(n) for n in EVALUATION_SIZES], verbose=False)
    validated = dict(evaluating.callback_metrics)
    # The order that a shuffling sampler of the user's own has.
    sampler = torch.utils.data.DistributedSampler(range(13), shuffle=True)
    own = DataLoader(text_examples(13), batch_size=4, collate_fn=collate, sampler=sampler)
    evaluating.test(module, own, verbose=False)
    return {
        "steps": steps,
        "seen": seen,
        "validated": {key: float(value) for key, value in validated.items()},
        "tested": {key: float(value) for key, value in evaluating.callback_metrics.items()},
        "weights": {name: value.clone() for name, value in module.model.state_dict().items()},
    }


# In torch 2.6 it does not, on a CPU.
FSDP2_RUNS_HERE = hasattr(torch.cpu.Stream, "record_event")


def train_models_made_late(folder: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Readings of a model from ``__init__``, and of ones from ``configure_model``, also sharded."""
    made: dict[str, Any] = {"init": (Module, "ddp"), "ddp": (MadeLate, "ddp")}
    if FSDP2_RUNS_HERE:
        sharded = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
        made["sharded"] = MadeLate, sharded
    found = {}
    for name, (module, strategy) in made.items():
        callbacks = [MatrixEntropyCallback(2, layers="all"), Kept("matrix_entropy/layer_00")]
        trainer = make_trainer(folder, world_size, callbacks, strategy=strategy, num_sanity_val_steps=2)
        trainer.fit(module(), loader(16 * world_size), loader(8))
        found[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return found


def train_with_failures(folder: str, rank: int, world_size: int) -> dict[str, Any]:
    """A mask, and then a probe, that fail on rank 1; the run stops early by readings."""

    def mask(batch: Any) -> Tensor:
        if rank == 1:
            raise KeyError("no mask here")
        return batch["attention_mask"]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = Kept("matrix_entropy/last")
        module = Module()
        seen = record_forwards(module.model)
        stopping = PlateauStopping("matrix_entropy/last", min_delta=5.0, patience=3, mode="any", verbose=False)
        callbacks = [MatrixEntropyCallback(1, mask=mask), kept, stopping]
        trainer = make_trainer(folder, world_size, callbacks, max_steps=20)
        trainer.fit(module, loader(80 * world_size), loader(13))
        probe = {"input_ids": torch.tensor([[5, 3, 8, 2, VOCABULARY if rank == 1 else 1]])}
        probed, probing = Kept("matrix_entropy/last"), Module()
        make_trainer(folder, world_size, [MatrixEntropyCallback(3, probe=probe), probed]).fit(
            probing, loader(16 * world_size)
        )
    return {
        "masked": kept.values,
        "seen": seen[:1],
        "stopped": trainer.global_step,
        "trend": stopping.observer.detector.state_dict(),
        "probed": probed.values,
        "weights": {name: value.clone() for name, value in probing.model.state_dict().items()},
        "warnings": [str(w.message) for w in caught],
    }


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    right = train_and_evaluate(folder, world_size)
    late = train_models_made_late(folder, world_size)
    return {"right": right, "late": late, "failing": train_with_failures(folder, rank, world_size)}
