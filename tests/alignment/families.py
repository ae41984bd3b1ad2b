"""Every family of vision-language models, built small, and batches for it with what becomes of one image alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, PAD, HIDDEN, PATCH, QWEN_PATCH = 60, 61, 0, 24, 4, 2
TEXT = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": PATCH,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
CLIP = {"model_type": "clip_vision_model", **VISION}
PINPOINTS = [[24, 12], [12, 24], [24, 24]]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}


class Sample(NamedTuple):
    """Sizes of its images in pixels, of which families with one size know nothing, and text before, between, after."""

    sizes: Sequence[tuple[int, int]]
    text: Sequence[int]


BATCH = (
    Sample([(24, 12)], [3, 4]),
    Sample([(4, 24), (24, 24)], [2, 3, 5]),
    Sample([], [9]),
    Sample([(24, 24)], [6, 7]),
)


@dataclass
class Family:
    """How a model is made, what an image is to it, and what becomes of one image alone."""

    build: Callable[[], Any]
    encode: Callable[[Any, Tensor, tuple[int, int]], Tensor]
    connect: Callable[[Any, Tensor, tuple[int, int]], Tensor]
    pixels: Callable[[tuple[int, int], bool], Tensor]
    collate: Callable[[Sequence[Sequence[Tensor]], Sequence[Sample]], dict[str, Any]]
    deep: Callable[[Any, Tensor, tuple[int, int]], list[Tensor]] = field(default=lambda *_: [])
    token_types: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda is_image: {})


# What an image is: one square, tiles of one (anyres), or patches (Qwen).


def square(side: int) -> Callable[[tuple[int, int], bool], Tensor]:
    return lambda size, alone: torch.randn(3, side, side, dtype=torch.float64)


def tiles(size: tuple[int, int], alone: bool) -> Tensor:
    rows, columns = grid(size, alone)
    return torch.randn(1 + rows * columns if rows else 1, 3, 12, 12, dtype=torch.float64)


def patches(size: tuple[int, int], alone: bool) -> Tensor:
    return torch.randn(size[0] // QWEN_PATCH * (size[1] // QWEN_PATCH), 3 * 2 * QWEN_PATCH**2, dtype=torch.float64)


def grid(size: tuple[int, int], alone: bool) -> tuple[int, int]:
    """Tiles high and wide; none beside the base tile for images of OneVision that are several in a sample."""
    return {(24, 12): (2, 1), (4, 24): (1, 2), (24, 24): (2, 2)}[size] if alone else (0, 0)


# What a family does with a batch of images.


def one_by_one(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([image for sample in images for image in sample])}


def tiled(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    flat = [image for sample in images for image in sample]
    padded = torch.zeros(len(flat), max(map(len, flat)), 3, 12, 12, dtype=torch.float64)
    for row, image in zip(padded, flat, strict=True):
        row[: len(image)] = image
    sizes = torch.tensor([size for sample in samples for size in sample.sizes])
    return {"pixel_values": padded, "image_sizes": sizes}


def tiled_and_counted(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    return {**tiled(images, samples), "batch_num_images": torch.tensor([len(sample.sizes) for sample in samples])}


def by_sample(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    pixel_values = torch.zeros(len(images), max(map(len, images)), 3, 16, 16, dtype=torch.float64)
    mask = torch.zeros(len(images), max(map(len, images)), 16, 16, dtype=torch.long)
    for i, sample in enumerate(images):
        for j, image in enumerate(sample):
            height, width = visible(samples[i].sizes[j])
            pixel_values[i, j, :, :height, :width] = image[:, :height, :width]
            mask[i, j, :height, :width] = 1
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask}


def visible(size: tuple[int, int]) -> tuple[int, int]:
    return (min(size[0], 16), min(size[1], 16))


def padded_pictures(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    flat = [image for sample in images for image in sample]
    pixel_values = torch.zeros(len(flat), 3, 24, 24, dtype=torch.float64)
    for row, image in zip(pixel_values, flat, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor([image.shape[1:] for image in flat])}


def packed(images: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> dict[str, Any]:
    grids = [[1, height // QWEN_PATCH, width // QWEN_PATCH] for sample in samples for height, width in sample.sizes]
    return {
        "pixel_values": torch.cat([image for sample in images for image in sample]),
        "image_grid_thw": torch.tensor(grids),
    }


# What becomes of one image alone.


def of_layer(layer: int, *, skip: int = 0) -> Callable[..., Tensor]:
    def encode(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
        rows = image if image.ndim == 4 else image[None]
        each = [model.model.vision_tower(row[None], output_hidden_states=True).hidden_states[layer] for row in rows]
        return torch.cat([states[0, skip:] for states in each])

    return encode


def last_state(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    return model.model.vision_tower(image[None]).last_hidden_state[0]


def pixtral_encode(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    states = model.model.vision_tower(image[None], image_sizes=torch.tensor([size]), output_hidden_states=True)
    return states.hidden_states[-1][0]


def pixtral_connect(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(pixtral_encode(model, image, size)[None])[0]


def project(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(last_state(model, image, size)[None])[0]


def llava_connect(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(FAMILIES["llava"].encode(model, image, size)[None])[0]


def anyres(encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Base tile, then the large picture row by row, without what is padding, a separator behind each row."""

    def connect(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
        newline = model.model.image_newline[None]
        projected = [model.model.multi_modal_projector(encode(model, tile[None], size)[None])[0] for tile in image]
        if len(image) == 1:
            return torch.cat([projected[0], newline])
        high, wide = grid(size, True)
        out = [projected[0]]
        # 4 x 24 pixels fill one row of patches, the middle one of the three that the tiles have.
        for row in [1] if size == (4, 24) else range(high * 3):
            for column in range(wide * 3):
                tile = projected[1 + (row // 3) * wide + column // 3]
                out.append(tile[(row % 3) * 3 + column % 3][None])
            out.append(newline)
        return torch.cat(out)

    return connect


def idefics_encode(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = visible(size)
    shown = torch.zeros_like(image)
    shown[:, :height, :width] = image[:, :height, :width]
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, : -(-height // PATCH), : -(-width // PATCH)] = True
    return model.model.vision_model(pixel_values=shown[None], patch_attention_mask=mask).last_hidden_state[0]


def idefics_connect(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    return model.model.connector(idefics_encode(model, image, size)[None])[0]


def visual(model: Any, image: Tensor, size: tuple[int, int]) -> Any:
    return model.model.visual(image, grid_thw=torch.tensor([[1, size[0] // QWEN_PATCH, size[1] // QWEN_PATCH]]))


def internvl_connect(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    states = of_layer(-1, skip=1)(model, image, size).view(4, 4, -1)
    # A token is a square of 2 x 2 patches; their order is that of the model's own shuffle.
    squares = [
        torch.cat([states[y, x : x + 2].flatten(), states[y + 1, x : x + 2].flatten()]) for y in (0, 2) for x in (0, 2)
    ]
    return model.model.multi_modal_projector(torch.stack(squares)[None])[0]


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some weights begin as zeros, and small ones would make all tokens alike.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def qwen_vision(**own: Any) -> dict[str, Any]:
    shared = {"depth": 2, "num_heads": 2, "patch_size": QWEN_PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return {**shared, **own}


def qwen(family: str, **vision: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{family}Config")
        return build(
            config(
                text_config={**TEXT, "rope_parameters": dict(MROPE)},
                vision_config=qwen_vision(**vision),
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                vision_start_token_id=58,
                vision_end_token_id=59,
            )
        )

    return make


def llava_like(family: str, vision: dict[str, Any], text: str, **own: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{family}Config")
        return build(config(vision_config=dict(vision), text_config={"model_type": text, **TEXT}, **own))

    return make


IDEFICS_VISION = {**VISION, "image_size": 16}
INTERNVL_VISION = {**VISION, "image_size": [16, 16], "patch_size": [PATCH, PATCH]}
QWEN_TRUTH = {
    "encode": lambda model, image, size: visual(model, image, size).last_hidden_state,
    "connect": lambda model, image, size: visual(model, image, size).pooler_output,
    "pixels": patches,
    "collate": packed,
    "token_types": lambda is_image: {"mm_token_type_ids": is_image.long()},
}
IDEFICS_TRUTH = {"encode": idefics_encode, "connect": idefics_connect, "pixels": square(16), "collate": by_sample}

FAMILIES = {
    "llava": Family(
        llava_like("Llava", CLIP, "llama", image_token_index=IMAGE),
        of_layer(-2, skip=1),
        llava_connect,
        square(12),
        one_by_one,
    ),
    "llava with pixtral": Family(
        llava_like(
            "Llava",
            {"model_type": "pixtral", **VISION, "image_size": 24, "head_dim": 8},
            "mistral",
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        pixtral_encode,
        pixtral_connect,
        lambda size, alone: torch.randn(3, *size, dtype=torch.float64),
        padded_pictures,
    ),
    "llava next": Family(
        llava_like("LlavaNext", CLIP, "llama", image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS),
        of_layer(-2, skip=1),
        anyres(of_layer(-2, skip=1)),
        lambda size, alone: tiles(size, True),
        tiled,
    ),
    "llava onevision": Family(
        llava_like(
            "LlavaOnevision",
            SIGLIP,
            "qwen2",
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        ),
        of_layer(-1),
        anyres(of_layer(-1)),
        tiles,
        tiled_and_counted,
    ),
    "paligemma": Family(
        llava_like("PaliGemma", SIGLIP, "gemma", image_token_index=IMAGE, projection_dim=HIDDEN, hidden_size=HIDDEN),
        last_state,
        project,
        square(12),
        one_by_one,
        token_types=lambda is_image: {"token_type_ids": torch.zeros_like(is_image, dtype=torch.long)},
    ),
    "idefics3": Family(llava_like("Idefics3", IDEFICS_VISION, "llama", image_token_id=IMAGE), **IDEFICS_TRUTH),
    "smolvlm": Family(llava_like("SmolVLM", IDEFICS_VISION, "llama", image_token_id=IMAGE), **IDEFICS_TRUTH),
    "qwen2 vl": Family(qwen("Qwen2VL", embed_dim=16, hidden_size=HIDDEN), **QWEN_TRUTH),
    "qwen2.5 vl": Family(
        qwen(
            "Qwen2_5_VL",
            hidden_size=16,
            out_hidden_size=HIDDEN,
            intermediate_size=32,
            window_size=4 * QWEN_PATCH,
            fullatt_block_indexes=[1],
        ),
        **QWEN_TRUTH,
    ),
    "qwen3 vl": Family(
        qwen(
            "Qwen3VL",
            hidden_size=16,
            out_hidden_size=HIDDEN,
            intermediate_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        deep=lambda model, image, size: visual(model, image, size).deepstack_features,
        **QWEN_TRUTH,
    ),
    "internvl": Family(
        llava_like("InternVL", INTERNVL_VISION, "qwen2", image_token_id=IMAGE),
        of_layer(-1, skip=1),
        internvl_connect,
        square(16),
        one_by_one,
    ),
    "gemma3": Family(
        llava_like(
            "Gemma3", {**SIGLIP, "image_size": 16}, "gemma3_text", image_token_index=IMAGE, mm_tokens_per_image=4
        ),
        last_state,
        project,
        square(16),
        one_by_one,
        token_types=lambda is_image: {"token_type_ids": is_image.long()},
    ),
}


class Probe(NamedTuple):
    samples: Sequence[Sample]
    ids: list[list[int]]
    images: list[list[Tensor]]


def make_probe(family: Family, model: Any, samples: Sequence[Sample] = BATCH, *, seed: int = 1) -> Probe:
    torch.manual_seed(seed)
    ids, images = [], []
    for sample in samples:
        own = [family.pixels(size, len(sample.sizes) == 1) for size in sample.sizes]
        row = []
        for i, length in enumerate(sample.text):
            row += torch.randint(3, 50, (length,)).tolist()
            if i < len(own):
                row += [IMAGE] * len(family.connect(model, own[i], sample.sizes[i]))
        ids.append(row)
        images.append(own)
    return Probe(samples, ids, images)


def collate(family: Family, probe: Probe, side: str = "right") -> dict[str, Any]:
    length = max(map(len, probe.ids))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        rest = [[fill] * (length - len(row)) for row in rows]
        return torch.tensor([r + p if side == "right" else p + r for r, p in zip(rows, rest, strict=True)])

    batch = {
        "input_ids": padded(probe.ids, PAD),
        "attention_mask": padded([[1] * len(row) for row in probe.ids], 0),
        **(family.collate(probe.images, probe.samples) if any(probe.images) else {}),
    }
    batch.update(family.token_types(batch["input_ids"] == IMAGE))
    return batch
