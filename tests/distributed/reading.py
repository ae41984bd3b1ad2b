"""What a reading has to be: the slow definition over the tokens of all ranks, in one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import VOCABULARY, collate, slow_pooled_entropy

Seen = list[tuple[Tensor, Tensor]]


def as_if_launched(rank: int, world_size: int) -> None:
    """The environment that a launcher gives its processes."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in known.items()})
    # Asked for, and not used: the processes are in a group already.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    )


def layer_names(count: int) -> list[str]:
    return [f"layer_{i:02d}" for i in range(count - 1)] + ["last"]


def pooled(seen: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The entropy of all tokens of batches that may differ in size and length."""
    seen = list(seen)
    longest = max(hidden.shape[1] for hidden, _ in seen)
    hidden = torch.cat([nn.functional.pad(h, (0, 0, 0, longest - h.shape[1])) for h, _ in seen])
    mask = torch.cat([nn.functional.pad(m, (0, longest - m.shape[1])) for _, m in seen])
    some = mask.bool().any(1)
    return slow_pooled_entropy(hidden[some], mask[some])


def over_examples(model: Any, examples: list[dict[str, Any]]) -> dict[str, float]:
    """Matrix entropy of each layer over a data set, each example once."""
    batch = collate(examples)
    with torch.no_grad():
        states = model.eval()(**batch, output_hidden_states=True).hidden_states
    names = layer_names(len(states))
    return {f"matrix_entropy/{n}": pooled([(h, batch["attention_mask"])]) for n, h in zip(names, states, strict=True)}


def record_forwards(model: Any) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Hidden states and mask of each training forward from now on, by the model's own means."""
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    forward: Callable[..., Any] = model.forward

    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return forward(*args, **kwargs)
        output = forward(*args, **{**kwargs, "output_hidden_states": True})
        seen.append((tuple(h.detach().clone() for h in output.hidden_states), kwargs["attention_mask"].clone()))
        return output

    model.forward = recorded
    return seen


def record_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Those that the model is trained on from now on."""
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append({key: kwargs[key].clone() for key in ("input_ids", "attention_mask")})

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return seen
