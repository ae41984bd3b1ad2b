"""The towers of dual encoders whose images have as many patches as they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import measure_alignment
from matent_callbacks.functional import linear_cka, matrix_entropy
from tests.versions import needs

SHAPES = [(2, 2), (2, 3), (4, 4), (1, 4)] * 3


def images() -> dict[str, Tensor]:
    """Patches of images of several sizes, padded with numbers that must not count."""
    shapes = torch.tensor(SHAPES)
    mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    return {
        "pixel_values": torch.randn(12, 16, 12, generator=torch.Generator().manual_seed(1)),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def texts() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (12, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rank(states: Tensor, mask: Tensor) -> float:
    each = [matrix_entropy(row[own > 0]) for row, own in zip(states, mask, strict=True)]
    return torch.stack(each).mean().exp().item()


@needs("transformers", "5.0")
def test_padded_patches_of_siglip_2_do_not_count():
    from transformers import Siglip2Config, Siglip2Model

    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = Siglip2Model(
        Siglip2Config(text_config=text, vision_config={**tower, "num_patches": 16, "patch_size": 2})
    ).eval()
    batch = {**images(), **texts()}
    values = measure_alignment(model, batch, k=3)
    with torch.no_grad():
        output = model(**batch)
    image = output.vision_model_output.last_hidden_state
    expected = rank(image, batch["pixel_attention_mask"])
    assert values["effective_rank/image_tower"] == pytest.approx(expected, rel=1e-4)
    assert rank(image, torch.ones(12, 16)) != pytest.approx(expected, rel=1e-2)
    text_states = output.text_model_output.last_hidden_state
    assert values["effective_rank/text_tower"] == pytest.approx(rank(text_states, batch["attention_mask"]), rel=1e-4)


class Pictures(nn.Module):
    def __init__(self, argument: str) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)
        self.argument = argument

    def forward(self, x: Tensor, patch_mask: Any = None, src_key_padding_mask: Any = None) -> Tensor:
        return self.layer(x)


class Pair(nn.Module):
    """A dual encoder of one's own, whose embeddings are the mean tokens."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.pictures, self.words = Pictures(argument), nn.Embedding(64, 8)

    def forward(self, pixel_values: Tensor, visible: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
        given = visible.bool()
        self.pictures(pixel_values, **{self.pictures.argument: given if "patch" in self.pictures.argument else ~given})
        self.words(input_ids)


@pytest.mark.parametrize("argument", ["patch_mask", "src_key_padding_mask"])
def test_the_mask_that_a_tower_is_given_counts_in_its_ranks_and_mean_tokens(argument):
    torch.manual_seed(0)
    model, batch = Pair(argument).eval(), {**images(), **texts()}
    visible = batch.pop("pixel_attention_mask")
    del batch["spatial_shapes"]
    values = measure_alignment(model, {**batch, "visible": visible}, towers=("pictures", "words"), k=3)
    with torch.no_grad():
        image, text = model.pictures.layer(batch["pixel_values"]), model.words(batch["input_ids"])
    assert values["effective_rank/image_tower"] == pytest.approx(rank(image, visible), rel=1e-4)

    def mean(states: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([row[own > 0].mean(0) for row, own in zip(states, mask, strict=True)])

    expected = linear_cka(mean(image, visible), mean(text, batch["attention_mask"])).item()
    assert values["alignment/cka"] == pytest.approx(expected, rel=1e-4)
