"""What each process of the DeepSpeed tests does."""

from __future__ import annotations

import os
from typing import Any

import torch

from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, text_examples
from tests.distributed.reading import as_if_launched, record_batches, small_llama
from tests.distributed.trainer_on_ranks import KeepWeights, make_trainer

EVALUATED = 13
STEPS = 4


def probe() -> dict[str, torch.Tensor]:
    return collate(text_examples(3, start=20))


def callbacks() -> list[Any]:
    return [MatrixEntropyCallback(2, layers="all"), MatrixEntropyCallback(2, metrics="rankme", probe=probe())]


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Of all ranks together; a collective call where parameters are sharded."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(folder: str, stage: int, callbacks: list[Any]) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    model = small_llama()
    seen, weights = record_batches(model), KeepWeights(whole_weights)
    trainer = make_trainer(
        folder, [*callbacks, weights], model=model, deepspeed=config, ddp_backend="gloo", logging_steps=1
    )
    trainer.train()
    return {
        "log": trainer.state.log_history,
        "seen": seen,
        "weights": [*weights.of_steps, whole_weights(trainer.model)],
        "random": torch.get_rng_state(),
        "evaluated": trainer.evaluate(text_examples(EVALUATED)) if callbacks else {},
        "engine": type(trainer.model_wrapped).__name__,
        "sharded": all(hasattr(parameter, "ds_id") for parameter in model.parameters()),
    }


def on_rank(rank: int, world_size: int, folder: str, stage: int) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Its collectives in shared memory would have to be compiled first; without them it talks over gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    as_if_launched(rank, world_size)
    return {"read": train(folder, stage, callbacks()), "plain": train(folder, stage, [])}
