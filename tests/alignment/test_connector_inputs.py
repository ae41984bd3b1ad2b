"""The stage before the connector in models that select or cut what their encoder gives in ways of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from matent_callbacks import measure_alignment
from matent_callbacks.functional import matrix_entropy
from tests.alignment.families import TEXT, VISION
from tests.pairs import make_llava
from tests.versions import needs

pytestmark = needs("transformers", "5.0")
IMAGE = 60


def batch_of(counts: list[int]) -> dict[str, Tensor]:
    """Samples with so many image tokens each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 59, (len(counts), max(counts) + 8), generator=generator)
    mask = torch.zeros_like(ids)
    for row, own, count in zip(ids, mask, counts, strict=True):
        row[1 : 1 + count] = IMAGE
        own[: count + 5] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def rank(each: list[Tensor]) -> float:
    return torch.stack([matrix_entropy(own) for own in each]).mean().exp().item()


def encoder_rank(model: Any, batch: dict[str, Any]) -> float:
    return measure_alignment(model, batch, pair_measures=[])["effective_rank/vision_encoder"]


@pytest.mark.parametrize("layers", [[-2, -3], -2])
def test_vip_llava_selects_several_layers_and_drops_the_class_token(layers):
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=layers,
    )
    config.image_token_id = IMAGE
    model = VipLlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(6, 3, 12, 12)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    taken = torch.cat([states[i][:, 1:] for i in ([layers] if isinstance(layers, int) else layers)], -1)
    found = encoder_rank(model, {**batch_of([9] * 6), "pixel_values": pixels})
    assert found == pytest.approx(rank(list(taken)), rel=1e-4)


def test_lfm2_takes_the_patches_that_are_not_padding():
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

    torch.manual_seed(0)
    vision = {**VISION, "num_patches": 16, "patch_size": 2}
    del vision["image_size"]
    model = Lfm2VlForConditionalGeneration(
        Lfm2VlConfig(
            text_config=Lfm2Config(**TEXT, layer_types=["full_attention", "conv"]),
            vision_config=Siglip2VisionConfig(**vision),
            image_token_id=IMAGE,
            downsample_factor=2,
            projector_hidden_size=20,
        )
    ).eval()
    # The last sample has two images.
    shapes = torch.tensor([[4, 4], [2, 2], [2, 4], [4, 2], [2, 2], [4, 4]])
    lengths = shapes.prod(1)
    given = {
        "pixel_values": torch.randn(6, 16, 12),
        "spatial_shapes": shapes,
        "pixel_attention_mask": (torch.arange(16) < lengths.unsqueeze(1)).long(),
    }
    with torch.no_grad():
        states = model.model.vision_tower(**given).last_hidden_state
    each = [own[:length] for own, length in zip(states, lengths, strict=True)]
    found = encoder_rank(model, {**batch_of([4, 1, 2, 2, 5]), **given})
    assert found == pytest.approx(rank([*each[:4], torch.cat(each[4:])]), rel=1e-4)
    assert rank(list(states)) != pytest.approx(rank(each), rel=1e-2)


def test_a_mask_of_patches_that_the_connector_is_given_is_refused():
    from transformers import AriaConfig, AriaForConditionalGeneration

    vision = {**VISION, "model_type": "idefics3_vision", "num_hidden_layers": 3}
    text = {**TEXT, "model_type": "aria_text", "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}
    torch.manual_seed(0)
    config = AriaConfig(
        vision_config=vision, text_config=text, projector_patch_to_query_dict={9: 4}, image_token_index=IMAGE
    )
    config.image_token_id = IMAGE
    model = AriaForConditionalGeneration(config).eval()
    mask = torch.ones(6, 12, 12, dtype=torch.bool)
    batch = {**batch_of([4] * 6), "pixel_values": torch.randn(6, 3, 12, 12), "pixel_mask": mask}
    assert encoder_rank(model, batch) > 1
    mask[0, 4:] = False
    with pytest.raises(ValueError, match=r"'vision_encoder' was not found .* a mask that hides some of the patches"):
        encoder_rank(model, batch)


def llava_with_selection(select: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = make_llava(dropout=0.0).eval()

    def get_image_features(pixel_values: Tensor, **kwargs: Any) -> Any:
        output = model.model.vision_tower(pixel_values, output_hidden_states=True)
        pooled = list(select(model.model, output.hidden_states))
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=pooled)

    monkeypatch.setattr(model.model, "get_image_features", get_image_features)
    batch = batch_of([9] * 6)
    batch["input_ids"][batch["input_ids"] == IMAGE] = 120
    return model, {**batch, "pixel_values": torch.randn(6, 3, 12, 12)}


def test_another_layer_than_the_config_says_is_seen(monkeypatch):
    model, batch = llava_with_selection(lambda own, states: own.multi_modal_projector(states[1][:, 1:]), monkeypatch)
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert encoder_rank(model, batch) == pytest.approx(rank(list(states[1][:, 1:])), rel=1e-4)


def test_what_the_connector_is_given_and_is_not_understood_is_refused(monkeypatch):
    def other_width(own: Any, states: Any) -> Tensor:
        return own.narrow(states[-1][:, 1:].reshape(6, 9, 8, 2).sum(-1))

    model, batch = llava_with_selection(other_width, monkeypatch)
    model.model.narrow = torch.nn.Linear(8, 24)
    with pytest.raises(ValueError, match=r"'vision_encoder' was not found .* its connector is given"):
        encoder_rank(model, batch)


def test_a_selection_by_an_unknown_name_is_refused_where_the_connector_is_not_seen(monkeypatch):
    model, batch = llava_with_selection(lambda own, states: states[1][:, 1:].repeat(1, 1, 2)[..., :24], monkeypatch)
    assert encoder_rank(model, batch) > 1
    model.model.config.vision_config.select_layer = -3
    with pytest.raises(ValueError, match=r"'vision_encoder' was not found .* its config has `select_layer`"):
        encoder_rank(model, batch)
