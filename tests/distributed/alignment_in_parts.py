"""What each process does in the tests of alignment with a language model that holds parts of sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks import measure_alignment
from matent_callbacks.transformers import AlignmentCallback
from tests.pairs import IMAGE_TOKEN, collate_pairs, llava_examples, seeing_llava

SEEN: list[int] = []
"""How many tokens attention had of each sequence on this rank."""


def ring_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of this rank's part of each sequence to the whole of it."""
    length, ranks = query.shape[2], dist.get_world_size()
    SEEN.append(length)
    whole = []
    for own in (key, value):
        everybodys = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(everybodys, own.contiguous())
        whole.append(torch.cat(everybodys, 2))
    rows = torch.arange(length).unsqueeze(1) + length * dist.get_rank()
    causal = torch.arange(length * ranks) <= rows
    out = nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=causal, scale=kwargs["scaling"])
    return out.transpose(1, 2), None


def probe() -> dict[str, Tensor]:
    """Samples of unlike lengths, one of text only. The image alone is an odd number of tokens."""
    batch = collate_pairs(llava_examples(12))
    batch["input_ids"][-1] = batch["input_ids"][-1].where(batch["input_ids"][-1] != IMAGE_TOKEN, 5)
    batch["pixel_values"] = batch["pixel_values"][:-1]
    return batch


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    from transformers import AttentionInterface

    AttentionInterface.register("ring", ring_attention)
    whole, model = seeing_llava(), seeing_llava()
    model.model.language_model.set_attn_implementation("ring")
    callback = AlignmentCallback(1, probe=probe(), context_group=dist.group.WORLD)
    found: dict[str, Any] = {"values": callback._alignment.measure(model), "lengths": set(SEEN)}
    found["alone"] = measure_alignment(whole, probe())
    for name, batch in {"other": collate_pairs(llava_examples(8 + rank)), "none": [] if rank else probe()}.items():
        callback = AlignmentCallback(1, probe=batch, context_group=dist.group.WORLD)
        try:
            callback._alignment.measure(model)
        except ValueError as error:
            found[name] = str(error)
    return found
