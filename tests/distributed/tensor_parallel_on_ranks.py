"""What each process of the tensor parallel tests does."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer

from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, text_examples
from tests.distributed.reading import as_if_launched, record_batches
from tests.distributed.trainer_on_ranks import KeepWeights, make_trainer

EVALUATED = 13


def probe() -> dict[str, torch.Tensor]:
    return collate(text_examples(3, start=20))


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


class OnCpu(Trainer):
    """Accelerate knows tensor parallelism on accelerators only: on CPU it refuses, and would put DDP around."""

    def create_accelerator_and_postprocess(self) -> None:
        with mock.patch("accelerate.ParallelismConfig._validate_accelerator"):
            super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model


def train(folder: str, pretrained: str, callbacks: list[Any]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(pretrained, tp_plan="auto")
    seen, weights = record_batches(model), KeepWeights(whole_weights)
    trainer = make_trainer(folder, [*callbacks, weights], model=model, trainer=OnCpu, logging_steps=1)
    trainer.train()
    return {
        "log": trainer.state.log_history,
        "seen": seen,
        "weights": [*weights.of_steps, whole_weights(model)],
        "random": torch.get_rng_state(),
        "evaluated": trainer.evaluate(text_examples(EVALUATED)) if callbacks else {},
        "sharded": type(model.model.layers[0].mlp.up_proj.weight).__name__,
    }


def on_rank(rank: int, world_size: int, folder: str, pretrained: str) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    callbacks = [MatrixEntropyCallback(1, layers="all"), MatrixEntropyCallback(4, metrics="rankme", probe=probe())]
    return {"read": train(folder, pretrained, callbacks), "plain": train(folder, pretrained, [])}
