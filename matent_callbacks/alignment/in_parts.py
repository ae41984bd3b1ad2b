"""Runs a context-parallel language model on whole sequences: splits them over the ranks, and gathers the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from matent_callbacks.alignment.joint_forward import language_model
from matent_callbacks.capture.calls import around_calls
from matent_callbacks.capture.values import first_tensor

# Arguments whose last dimension is tokens.
_OF_TOKENS = ("attention_mask", "position_ids", "cache_position", "visual_pos_masks")


@contextmanager
def in_parts(model: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, each rank of ``group`` runs its part of the language model's input, and gets the output of all parts.

    Sequences are padded on the right to a multiple of the number of ranks, and cut into parts of equal length in rank
    order, which keep their positions in the whole sequence. Every rank of the group has to make the same calls.

    Args:
        model: A vision-language model of transformers, wrapped or not, that is given the same batch on each rank.
        group: ``None``: sequences stay whole.
    """
    if group is None:
        yield
        return

    def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        if args or not isinstance(embeddings, Tensor) or embeddings.ndim != 3:
            return forward(*args, **kwargs)
        output = forward(**_own_part(kwargs, embeddings, group))
        own = first_tensor(output)
        assert own is not None
        whole = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(whole, own.contiguous(), group=group)
        return _with_states(output, torch.cat(whole, 1)[:, : embeddings.shape[1]])

    undo = around_calls(language_model(model), call, replicas=False)
    try:
        yield
    finally:
        undo()


def _own_part(kwargs: Mapping[str, Any], embeddings: Tensor, group: dist.ProcessGroup) -> dict[str, Any]:
    length, ranks = embeddings.shape[1], dist.get_world_size(group)
    missing = -length % ranks
    size = (length + missing) // ranks
    start = size * dist.get_rank(group)
    part = dict(kwargs)
    part["inputs_embeds"] = F.pad(embeddings, (0, 0, 0, missing))[:, start : start + size]
    positions = torch.arange(length, device=embeddings.device)
    part["position_ids"] = positions.unsqueeze(0) if kwargs.get("position_ids") is None else kwargs["position_ids"]
    for name in _OF_TOKENS:
        value = part.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape[-1] != length or (name == "attention_mask" and value.ndim != 2):
            raise ValueError(
                f"`context_group` needs a language model that is given `{name}` by tokens, (..., {length}), got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
            )
        part[name] = F.pad(value, (0, missing))[..., start : start + size]
    deep, is_image = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if deep is not None and is_image is not None:
        # One row for each image token of the whole batch.
        here = torch.zeros_like(is_image)
        here[:, start : start + size] = True
        part["deepstack_visual_embeds"] = [features[here[is_image]] for features in deep]
    return part


def _with_states(output: Any, states: Tensor) -> Any:
    """Return a model output with its hidden states replaced."""
    if isinstance(output, dict):
        output["last_hidden_state"] = states
        return output
    return (states, *output[1:]) if isinstance(output, tuple) else states
