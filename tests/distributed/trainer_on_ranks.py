"""What each process of the Hugging Face tests does; as a script under torchrun, and on the ranks of the tests."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from matent_callbacks.transformers import MatrixEntropyCallback, PlateauStopping
from tests.conftest import VOCABULARY, collate, text_examples
from tests.distributed.reading import as_if_launched, record_forwards, small_llama
from tests.ranks import leave

# Of batches of 4: none whole, one rank with nothing new, some ranks with a part, all even.
EVALUATION_SIZES = (3, 10, 13, 16)
DISPATCHED = 11


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(text_examples(DISPATCHED))


def make_trainer(
    folder: str, callbacks: list[Any], *, model: Any = None, trainer: type[Trainer] = Trainer, **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 100,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return trainer(
        model=small_llama() if model is None else model,
        args=TrainingArguments(folder, **{**settings, **arguments}),
        train_dataset=text_examples(64),
        data_collator=collate,
        callbacks=callbacks,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class KeepWeights(TrainerCallback):
    """Those that each step is computed with, put together by ``whole``."""

    def __init__(self, whole: Callable[[nn.Module], dict[str, torch.Tensor]]) -> None:
        self.of_steps: list[dict[str, torch.Tensor]] = []
        self._whole = whole

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.of_steps.append(self._whole(model))


def train_and_evaluate(folder: str) -> dict[str, Any]:
    """Readings of training steps with what was read, and of evaluations whose last batch is uneven."""
    model = small_llama()
    trainer = make_trainer(folder, [MatrixEntropyCallback(2, layers="all")], model=model)
    seen = record_forwards(model)
    trainer.train()
    steps = [record for record in trainer.state.log_history if "matrix_entropy/last" in record]
    evaluations: dict[Any, dict[str, float]] = {n: trainer.evaluate(text_examples(n)) for n in EVALUATION_SIZES}
    evaluations["dispatched"] = trainer.evaluate(Stream())
    split = make_trainer(
        folder,
        [MatrixEntropyCallback(1, layers="all")],
        model=model,
        accelerator_config={"split_batches": True},
    )
    for n in EVALUATION_SIZES:
        evaluations["split", n] = split.evaluate(text_examples(n))
    return {"steps": steps, "seen": seen, "evaluations": evaluations, "weights": weights(model)}


class Tap(nn.Module):
    """A module beside the way of the hidden states, that on one rank gives what cannot be read."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.sum() if self.broken else hidden


def tapped_llama(*, broken: bool) -> Any:
    model = small_llama()
    model.model.tap = Tap(broken=broken)

    def pass_by(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        model.model.tap(output)

    model.model.norm.register_forward_hook(pass_by)
    return model


def train_with_failures(folder: str, rank: int) -> dict[str, Any]:
    """A hook, and then a probe, that fail on rank 1; the run stops early by readings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stopping = PlateauStopping("matrix_entropy/last", min_delta=5.0, patience=3, mode="any", verbose=False)
        trainer = make_trainer(
            folder,
            [MatrixEntropyCallback(1, layers=["last", "model.tap"]), stopping],
            model=tapped_llama(broken=rank == 1),
            max_steps=20,
        )
        trainer.train()
        token = VOCABULARY if rank == 1 else 1
        probe = {"input_ids": torch.tensor([[5, 3, 8, 2, token]])}
        probing = make_trainer(folder, [MatrixEntropyCallback(2, probe=probe)])
        probing.train()
    return {
        "hook": trainer.state.log_history,
        "stopped": trainer.state.global_step,
        "trend": stopping.observer.detector.state_dict(),
        "probe": probing.state.log_history,
        "weights": weights(probing.model),
        "warnings": [str(w.message) for w in caught],
    }


def launched(rank: int, folder: str) -> dict[str, Any]:
    return {"right": train_and_evaluate(folder), "failing": train_with_failures(folder, rank)}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    return launched(rank, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank = int(os.environ["RANK"])
    torch.save(launched(own_rank, sys.argv[1]), f"{sys.argv[1]}/{own_rank}.pt")
    leave()
