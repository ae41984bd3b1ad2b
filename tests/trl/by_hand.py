"""What a reading of one of TRL's trainers has to be: each sequence of its losses alone, and the slow definitions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.conftest import slow_entropy, slow_pooled_entropy

METRICS = ("matrix_entropy", "sequence_matrix_entropy")

# What a batch calls tokens and mask, in one part or in two that follow each other.
_PROMPT = ("prompt_input_ids", "prompt_attention_mask")
_PARTS = (
    [("input_ids", "attention_mask")],
    [("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")],
    # TRL before 1.0
    [_PROMPT, ("chosen_input_ids", "chosen_attention_mask")],
    [_PROMPT, ("rejected_input_ids", "rejected_attention_mask")],
    [("completion_input_ids", "completion_attention_mask")],
)
_MISMATCHED = (
    [("KL_input_ids", "KL_attention_mask")],
    [("KL_completion_input_ids", "KL_completion_attention_mask")],
)


class Loss(NamedTuple):
    """One call of a trainer's loss."""

    step: int
    """That is being computed, from 1."""
    training: bool
    weights: dict[str, Tensor]
    sequences: list[Tensor]
    """Tokens, without padding."""
    mismatched: list[Tensor]
    """Prompts with the completions of others, of which KTO estimates a divergence."""


def record_losses(trainer: Any) -> list[Loss]:
    """Weights and tokens of each loss that is computed from now on."""
    losses: list[Loss] = []
    # DPO and KTO before TRL 1.0 evaluate by the former.
    name = "get_batch_loss_metrics" if hasattr(trainer, "get_batch_loss_metrics") else "compute_loss"
    compute_loss: Callable[..., Any] = getattr(trainer, name)

    @functools.wraps(compute_loss)
    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        losses.append(
            Loss(
                trainer.state.global_step + 1,
                trainer.model.training,
                weights,
                list(_sequences(inputs, _PARTS)),
                list(_sequences(inputs, _MISMATCHED)),
            )
        )
        return compute_loss(model, inputs, *args, **kwargs)

    setattr(trainer, name, recorded)
    return losses


def _sequences(batch: dict[str, Any], all_parts: Iterable[list[tuple[str, str]]]) -> Iterator[Tensor]:
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        yield from batch["input_ids"][0].tensor_split(starts[1:])
        return
    for parts in all_parts:
        if all(ids in batch for ids, _ in parts):
            tokens = torch.cat([batch[ids] for ids, _ in parts], dim=1)
            valid = torch.cat([batch[mask] for _, mask in parts], dim=1).bool()
            yield from (row[kept] for row, kept in zip(tokens, valid, strict=True))


def readings(model: Any, sequences: Iterable[Tensor]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        states = [model(input_ids=ids.unsqueeze(0), output_hidden_states=True).hidden_states for ids in sequences]
    result: dict[str, float] = {}
    for i, layer in enumerate(zip(*states, strict=True)):
        name = f"layer_{i:02d}" if i < len(states[0]) - 1 else "last"
        hidden: Any = [state[0].detach() for state in layer]
        result[f"matrix_entropy/{name}"] = slow_pooled_entropy(hidden)
        result[f"sequence_matrix_entropy/{name}"] = sum(map(slow_entropy, hidden)) / len(hidden)
    return result


def steps_by_hand(trainer: Any, losses: list[Loss]) -> dict[int, dict[str, float]]:
    """Of each step, over all of its micro-batches. The model is left with other weights."""
    expected = {}
    for step in sorted({loss.step for loss in losses if loss.training}):
        of_step = [loss for loss in losses if loss.training and loss.step == step]
        trainer.model.load_state_dict(of_step[0].weights)
        expected[step] = readings(trainer.model, [ids for loss in of_step for ids in loss.sequences])
    return expected


def steps_as_logged(trainer: Any) -> dict[int, dict[str, float]]:
    records = [record for record in trainer.state.log_history if "matrix_entropy/last" in record]
    return {r["step"]: {key: r[key] for key in r if key.startswith(METRICS)} for r in records}


def evaluation_as_logged(metrics: dict[str, float]) -> dict[str, float]:
    prefixed = tuple(f"eval_{name}/" for name in METRICS)
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith(prefixed)}
