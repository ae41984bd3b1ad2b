"""TRL's trainers do the same with the callback and without it, bit by bit, in the settings that they come with."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl

from matent_callbacks.transformers import MatrixEntropyCallback
from tests.trl import trainers

TRAINERS = {
    "SFT": trainers.sft,
    "SFT, packed": functools.partial(trainers.sft, packing=True),
    "DPO": trainers.dpo,
    # With both bf16 and checkpointing, that of TRL 1.0 fails by itself.
    "KTO": functools.partial(trainers.kto, gradient_checkpointing=False),
    "Reward": trainers.reward,
    "GRPO": trainers.grpo,
    "RLOO": trainers.rloo,
}
OF_THE_CLOCK = ("runtime", "per_second", "step_time")
READINGS = ("matrix_entropy", "effective_rank")


def own_records(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer logs without the callback, but for what no two runs share."""
    return [
        {key: repr(value) for key, value in record.items() if not any(part in key for part in OF_THE_CLOCK + READINGS)}
        for record in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("name", "adapter"), [*((name, False) for name in TRAINERS), ("SFT", True), ("DPO", True), ("GRPO", True)]
)
def test_training_and_evaluation_are_bitwise_the_same(name, adapter, tmp_path: Path):
    def run(folder: Path, callbacks: list[Any]) -> tuple[Any, ...]:
        model = trainers.causal_model(folder, dropout=0.1)
        policy = trainers.with_new_adapter(model) if adapter else {"model": model}
        # As users have it: bf16, gradient checkpointing, and here dropout, in what of it is not switched off.
        trainer = TRAINERS[name](folder, callbacks, **policy, bf16=None, eval_strategy="steps", eval_steps=2)
        trainer.train()
        random_numbers = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
        weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        return trainer, weights, random_numbers

    plain, weights, random_numbers = run(tmp_path / "plain", [])
    read, weights_read, random_numbers_read = run(tmp_path / "read", [MatrixEntropyCallback(1, "all")])
    assert sum("matrix_entropy/last" in record for record in read.state.log_history) == trainers.STEPS
    assert sum("eval_matrix_entropy/last" in record for record in read.state.log_history) == trainers.STEPS // 2
    assert own_records(read) == own_records(plain)
    assert random_numbers_read == random_numbers
    assert weights_read.keys() == weights.keys()
    assert all(torch.equal(weights_read[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_readings_in_the_background_leave_the_trainers_own_numbers_under_their_steps(name, tmp_path: Path):
    def run(folder: Path, callbacks: list[Any]) -> Any:
        trainer = TRAINERS[name](folder, callbacks, model=trainers.causal_model(folder))
        trainer.train()
        return trainer

    plain, read = run(tmp_path / "plain", []), run(tmp_path / "read", [MatrixEntropyCallback(1, background=True)])
    late = [record for record in read.state.log_history if "matrix_entropy/last" in record]
    assert [record["step"] for record in late] == list(range(1, trainers.STEPS + 1))
    assert all(record.keys() == {"step", "epoch", "matrix_entropy/last", "effective_rank/last"} for record in late)
    assert [record for record in own_records(read) if record.keys() != {"step", "epoch"}] == own_records(plain)


def test_a_trainer_that_has_no_hash(tmp_path: Path, monkeypatch):
    # As KTOTrainer of TRL 1.0, which is a dataclass.
    monkeypatch.setattr(trl.SFTTrainer, "__hash__", None)
    trainer = trainers.sft(tmp_path, [MatrixEntropyCallback(1)], model=trainers.causal_model(tmp_path), max_steps=1)
    trainer.train()
    assert "matrix_entropy/last" in trainer.state.log_history[0]
