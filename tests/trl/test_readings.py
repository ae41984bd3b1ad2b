"""What is read of TRL's trainers, and what is not: the policy's own forwards, each of its tokens once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from matent_callbacks import EntropyMonitor
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import slow_pooled_entropy
from tests.trl import trainers
from tests.trl.by_hand import (
    METRICS,
    evaluation_as_logged,
    readings,
    record_losses,
    steps_as_logged,
    steps_by_hand,
)


def reading_callback() -> MatrixEntropyCallback:
    # Virtual tokens of a prompt that has seen nothing may be longer than those of text.
    return MatrixEntropyCallback(1, "all", metrics=METRICS, exclude_sinks=False)


def check_training(trainer: Any, *, micro_batches: int = 1) -> None:
    losses = record_losses(trainer)
    trainer.train()
    assert len(losses) == trainers.STEPS * micro_batches
    logged = steps_as_logged(trainer)
    expected = steps_by_hand(trainer, losses)
    assert sorted(logged) == list(range(1, trainers.STEPS + 1))
    for step, values in logged.items():
        assert values == pytest.approx(expected[step], rel=1e-5)


def check_evaluation(trainer: Any, sequences: list[torch.Tensor]) -> None:
    metrics = trainer.evaluate()
    assert evaluation_as_logged(metrics) == pytest.approx(readings(trainer.model, sequences), rel=1e-5)


def tokens(*parts: str) -> torch.Tensor:
    return torch.tensor([*map(ord, "".join(parts)), trainers.EOS])


def documents() -> list[torch.Tensor]:
    return [tokens(text) for text in trainers.texts(start=0, shortest=12)]


def chosen_and_rejected() -> list[torch.Tensor]:
    evaluated = trainers.pairs()[: trainers.EVALUATED]
    return [tokens(pair["prompt"], pair[side]) for pair in evaluated for side in ("chosen", "rejected")]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(packing, tmp_path: Path):
    micro_batches = 1 if packing else 2
    trainer = trainers.sft(
        tmp_path,
        [reading_callback()],
        model=trainers.causal_model(tmp_path),
        packing=packing,
        gradient_accumulation_steps=micro_batches,
    )
    check_training(trainer, micro_batches=micro_batches)
    check_evaluation(trainer, documents()[: trainers.EVALUATED])


def test_a_second_forward_for_the_logits_changes_nothing(tmp_path: Path):
    trainer = trainers.sft(tmp_path, [reading_callback()], model=trainers.causal_model(tmp_path))
    evaluated = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions is not None
    for name in METRICS:
        assert predicted.metrics[f"test_{name}/last"] == pytest.approx(evaluated[f"eval_{name}/last"], rel=1e-6)


def test_dpo_reads_the_policy_on_chosen_and_rejected(tmp_path: Path):
    trainer = trainers.dpo(tmp_path, [reading_callback()], model=trainers.causal_model(tmp_path))
    assert trainer.ref_model is not None
    check_training(trainer)
    check_evaluation(trainer, chosen_and_rejected())


@pytest.mark.parametrize("make", trainers.ADAPTERS)
def test_dpo_whose_reference_is_the_policy_with_its_adapter_off_or_another_on(make, tmp_path: Path):
    trainer = trainers.dpo(tmp_path, [reading_callback()], **make(trainers.causal_model(tmp_path)))
    assert trainer.ref_model is None
    check_training(trainer)
    check_evaluation(trainer, chosen_and_rejected())


@pytest.mark.parametrize("adapter", [False, True])
def test_kto(adapter, tmp_path: Path):
    model = trainers.causal_model(tmp_path)
    policy = trainers.with_new_adapter(model) if adapter else {"model": model}
    trainer = trainers.kto(tmp_path, [reading_callback()], **policy)
    check_training(trainer)
    # Without gradients, the forwards of the policy that the KL term is made from are like all others.
    losses = record_losses(trainer)
    metrics = trainer.evaluate()
    sequences = [ids for loss in losses for ids in (*loss.sequences, *loss.mismatched)]
    assert evaluation_as_logged(metrics) == pytest.approx(readings(trainer.model, sequences), rel=1e-5)


def test_reward(tmp_path: Path):
    trainer = trainers.reward(tmp_path, [reading_callback()], model=trainers.causal_model(tmp_path))
    check_training(trainer)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("make", [trainers.grpo, trainers.rloo])
def test_online_trainers_do_not_read_generation(make, adapter, tmp_path: Path):
    model = trainers.causal_model(tmp_path)
    policy = trainers.with_new_adapter(model) if adapter else {"model": model}
    trainer = make(tmp_path, [reading_callback()], **policy)
    check_training(trainer)
    losses = record_losses(trainer)
    metrics = trainer.evaluate()
    sequences = [ids for loss in losses for ids in loss.sequences]
    assert evaluation_as_logged(metrics) == pytest.approx(readings(trainer.model, sequences), rel=1e-5)


def test_generation_with_the_state_of_mamba_is_not_read():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    ids = torch.arange(2, 14).view(2, 6)
    monitor = EntropyMonitor(model)
    with monitor, torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        model.generate(ids + 12, max_new_tokens=3)
    assert monitor.compute()["matrix_entropy/last"] == pytest.approx(slow_pooled_entropy(hidden), rel=1e-5)
