"""Small image-text models and pairs for them: patterns that their captions name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE_TOKEN, PATCHES, SIDE = 120, 9, 12
COLOURS = ("red", "green", "blue", "white")
SHAPES = ("left", "right", "top", "bottom")


def make_llava(*, seed: int = 0, dropout: float = 0.1) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN)
    )


def seeing_llava() -> Any:
    """One whose captions depend on the picture, if only by chance."""
    model = make_llava()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_clip(*, seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            vision_config={**tower, "image_size": SIDE, "patch_size": 4},
            text_config={**tower, "vocab_size": 128, "max_position_embeddings": 32, "eos_token_id": 2},
            projection_dim=8,
        )
    )


def pairs(count: int) -> list[tuple[Tensor, str]]:
    """Pictures ``(3, 12, 12)`` of one half in one colour on noise, and what they show."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        colour, shape = COLOURS[i % 4], SHAPES[i // 4 % 4]
        picture = 0.2 * torch.randn(3, SIDE, SIDE, generator=generator)
        half = {"left": (slice(None), slice(6)), "right": (slice(None), slice(6, 12))}
        half |= {"top": (slice(6), slice(None)), "bottom": (slice(6, 12), slice(None))}
        channels = range(3) if colour == "white" else [("red", "green", "blue").index(colour)]
        for channel in channels:
            picture[(channel, *half[shape])] += 1
        found.append((picture, f"{colour} at {shape}"))
    return found


def llava_examples(count: int) -> list[dict[str, Any]]:
    examples = []
    for picture, caption in pairs(count):
        ids = [1, *[IMAGE_TOKEN] * PATCHES, *[ord(c) % 110 + 3 for c in caption]]
        examples.append({"input_ids": ids, "pixel_values": picture, "labels": [-100] * (PATCHES + 1) + ids[10:]})
    return examples


def clip_examples(count: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": [1, *[ord(c) % 110 + 3 for c in caption], 2], "pixel_values": picture}
        for picture, caption in pairs(count)
    ]


def collate_pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples])
        for key, value in fill.items()
        if key in examples[0]
    }
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    batch["pixel_values"] = torch.stack([torch.as_tensor(e["pixel_values"]) for e in examples])
    return batch
