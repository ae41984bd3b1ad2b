"""The five readings of every family of vision-language models are those of a slow computation without any batch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from matent_callbacks.alignment.vision_language import vision_language_stages
from matent_callbacks.capture.inference import side_effect_free
from matent_callbacks.functional import matrix_entropy
from matent_callbacks.functional.alignment import STAGES
from tests.alignment.families import BATCH, FAMILIES, IMAGE, VISION, Family, Probe, Sample, collate, make_probe
from tests.versions import needs


def slow_stages(family: Family, model: Any, probe: Probe, index: int) -> dict[str, Tensor]:
    """The five sequences of one sample, (n, d) each: image by image, no batch, no padding, no mask."""
    ids, images, sizes = probe.ids[index], probe.images[index], probe.samples[index].sizes
    pairs = list(zip(images, sizes, strict=True))
    connected = torch.cat([family.connect(model, image, size) for image, size in pairs])
    deep = [torch.cat(layer) for layer in zip(*(family.deep(model, *pair) for pair in pairs), strict=True)]
    seen = torch.ones(1, len(connected), dtype=torch.bool)
    added = {"visual_pos_masks": seen, "deepstack_visual_embeds": deep} if deep else {}
    decoder = model.get_decoder()
    text = torch.tensor([[token for token in ids if token != IMAGE]])
    alone = collate(family, Probe([probe.samples[index]], [ids], [images]))
    return {
        "vision_encoder": torch.cat([family.encode(model, image, size) for image, size in pairs]),
        "connector": connected,
        "image": decoder(inputs_embeds=connected[None], **added).last_hidden_state[0],
        "text": decoder(input_ids=text).last_hidden_state[0],
        "image_text": model(**alone, output_hidden_states=True).hidden_states[-1][0],
    }


def entropies(stages: dict[str, Any]) -> dict[str, Tensor]:
    return {name: matrix_entropy(stage.hidden_states, stage.mask) for name, stage in stages.items()}


def assert_readings_agree(family: Family, model: Any, probe: Probe, batch: dict[str, Any], read: Any = None) -> None:
    with side_effect_free(model):
        stages, skipped = vision_language_stages(model if read is None else read, batch)
        with_image = [i for i, sample in enumerate(probe.samples) if sample.sizes]
        slow = [slow_stages(family, model, probe, i) for i in with_image]
    assert list(stages) == list(STAGES)
    assert skipped == len(probe.samples) - len(with_image)
    for name, found in entropies(stages).items():
        expected = torch.stack([matrix_entropy(each[name]) for each in slow])
        assert stages[name].mask.sum(1).tolist() == [len(each[name]) for each in slow], name
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@needs("transformers", "5.0")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_five_readings_are_those_of_each_sample_alone(name, side, models):
    family, model = FAMILIES[name], models(name)
    probe = make_probe(family, model)
    assert_readings_agree(family, model, probe, collate(family, probe, side))


@needs("transformers", "5.0")
def test_wrapped_by_peft(models):
    peft = pytest.importorskip("peft")
    family = FAMILIES["smolvlm"]
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(family.build(), lora).double()
    inner = wrapped.get_base_model()
    probe = make_probe(family, inner)
    batch = collate(family, probe)
    assert_readings_agree(family, inner, probe, batch, read=wrapped)
    with side_effect_free(wrapped):
        adapted = entropies(vision_language_stages(wrapped, batch)[0])
        plain = entropies(vision_language_stages(models("smolvlm"), batch)[0])
    assert all((adapted[name] - plain[name]).abs().max() > 1e-3 for name in STAGES)


def compile_decoder(model: Any) -> Any:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


@needs("transformers", "5.0")
@pytest.mark.parametrize(
    "compile_it",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.compile(backend="eager") or model,
        compile_decoder,
    ],
    ids=["around", "in place", "decoder"],
)
def test_compiled_models_are_read_without_their_graph(compile_it, models):
    family, plain = FAMILIES["llava"], models("llava")
    compiled = compile_it(family.build())
    probe = make_probe(family, plain)
    batch = collate(family, probe)
    with side_effect_free(plain):
        # The very call that is made to read: its graph is there, and hooks placed later do not fire in it.
        compiled(**batch, use_cache=False, logits_to_keep=1)
    assert_readings_agree(family, plain, probe, batch, read=compiled)


@needs("transformers", "5.0")
@pytest.mark.parametrize("name", ["llava", "qwen2 vl"])
def test_without_a_head_and_without_a_mask(name, models):
    family, model = FAMILIES[name], models(name)
    probe = make_probe(family, model, BATCH[:1])
    batch = {key: value for key, value in collate(family, probe).items() if key != "attention_mask"}
    assert_readings_agree(family, model, probe, batch, read=model.model)


@needs("transformers", "5.0")
def test_labels_change_nothing(models):
    family, model = FAMILIES["llava"], models("llava")
    probe = make_probe(family, model)
    batch = collate(family, probe)
    assert_readings_agree(family, model, probe, {**batch, "labels": batch["input_ids"]})


@needs("transformers", "5.0")
@pytest.mark.parametrize("name", ["llava", "llava next", "qwen3 vl"])
def test_no_hook_no_cache_and_no_graph_stays(name, models):
    family, model = FAMILIES[name], models(name)
    batch = collate(family, make_probe(family, model))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    caches = []
    handle = model.get_decoder().register_forward_hook(lambda _, __, output: caches.append(output.past_key_values))
    try:
        with side_effect_free(model):
            stages, _ = vision_language_stages(model, batch)
    finally:
        handle.remove()
    assert caches == [None, None, None]
    # What transformers itself puts in place, once, to give hidden states to whoever asks.
    own = [
        {k: h for k, h in module._forward_hooks.items() if "transformers" not in h.__module__}
        for module in model.modules()
    ]
    assert all(after.items() <= before.items() for before, after in zip(hooks, own, strict=True))
    assert not any(stage.hidden_states.requires_grad for stage in stages.values())


@needs("transformers", "5.0")
def test_the_hook_is_gone_after_an_exception(models):
    family, model = FAMILIES["qwen2 vl"], models("qwen2 vl")
    batch = collate(family, make_probe(family, model))
    before = dict(model.get_decoder()._forward_hooks)
    with pytest.raises(ValueError, match="mm_token_type_ids"), side_effect_free(model):
        vision_language_stages(model, {key: value for key, value in batch.items() if key != "mm_token_type_ids"})
    assert dict(model.get_decoder()._forward_hooks) == before


@needs("transformers", "5.0")
@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2.5 vl", "idefics3"])
def test_pixels_that_are_not_finite_stay_in_their_sample(name, models):
    family, model = FAMILIES[name], models(name)
    probe = make_probe(family, model)
    with side_effect_free(model):
        clean = entropies(vision_language_stages(model, collate(family, probe))[0])
        probe.images[0][0][..., 0] = torch.nan
        dirty = entropies(vision_language_stages(model, collate(family, probe))[0])
    for name in STAGES:
        torch.testing.assert_close(dirty[name][1:], clean[name][1:], rtol=0, atol=1e-9)
    assert dirty["image"][0].isnan()
    torch.testing.assert_close(dirty["text"], clean["text"], rtol=0, atol=1e-9)


@needs("transformers", "5.0")
def test_a_sample_of_images_only_has_no_text_row(models):
    family, model = FAMILIES["internvl"], models("internvl")
    probe = make_probe(family, model, [Sample([(24, 24)], [0, 0]), Sample([(24, 24)], [4, 4])])
    with side_effect_free(model):
        stages, _ = vision_language_stages(model, collate(family, probe))
    assert {name: stage.mask.sum(1).tolist() for name, stage in stages.items()} == {
        "vision_encoder": [16, 16],
        "connector": [4, 4],
        "image": [4, 4],
        "text": [0, 8],
        "image_text": [4, 12],
    }
    assert entropies(stages)["text"].isnan().tolist() == [True, False]


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: {key: value for key, value in batch.items() if key not in keys}


def changed(**changes: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: {**batch, **{key: change(batch[key].clone()) for key, change in changes.items()}}


def set_at(index: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("input_ids"), r"`input_ids` must be in the batch, a tensor \(B, T\), got NoneType"),
        (without("pixel_values"), "`pixel_values` must be in the batch.* got .*'input_ids'"),
        (changed(attention_mask=lambda m: m[:, 1:]), r"`attention_mask` must have the shape of `input_ids`.*got \(4, "),
        (
            changed(input_ids=torch.zeros_like),
            "`input_ids` must hold image tokens .60. for its `pixel_values`, got none",
        ),
        (changed(attention_mask=set_at((0, 3), 0)), "`attention_mask` must be 1 at every image token, got 0 at 1"),
        (changed(input_ids=lambda ids: torch.full_like(ids, IMAGE)), "`attention_mask` must be 1 at every image token"),
        pytest.param(
            changed(input_ids=set_at((0, 3), 5)),
            "`input_ids` must hold as many image tokens .* 36, got 35",
            marks=needs("transformers", "5.0"),
        ),
        pytest.param(
            changed(pixel_values=lambda p: p[1:]),
            "`input_ids` must hold as many image tokens .* 27, got 36",
            marks=needs("transformers", "5.0"),
        ),
        pytest.param(
            lambda batch: changed(input_ids=set_at((3, 0), IMAGE))(changed(input_ids=set_at((0, 3), 5))(batch)),
            "`input_ids` must hold the tokens of whole images in each sample, got 8 in sample 0 .* 9, 9, 9, 9",
            marks=needs("transformers", "5.0"),
        ),
        (lambda batch: {**batch, "pixel_values_videos": torch.zeros(1)}, "`pixel_values_videos` must not be"),
    ],
)
def test_batches_that_cannot_be_read_say_why(change, message, models):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model))
    with pytest.raises(ValueError, match=message), side_effect_free(model):
        vision_language_stages(model, change(batch))


def test_images_without_any_text(models):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model, [Sample([(24, 24)], [0, 0])] * 2))
    with (
        pytest.raises(ValueError, match=r"`input_ids` must hold text .* got image tokens only"),
        side_effect_free(model),
    ):
        vision_language_stages(model, batch)


@needs("transformers", "5.0")
def test_tiles_that_cannot_be_told_from_padding(models):
    family, model = FAMILIES["llava next"], models("llava next")
    batch = collate(family, make_probe(family, model))
    batch["pixel_values"][0, 1] = 0
    with pytest.raises(ValueError, match=r"'vision_encoder' was not found .* not clear .* belong to which sample"):
        vision_language_stages(model, batch)


def test_models_that_are_not_of_the_kind(make_llama, models):
    batch = collate(FAMILIES["llava"], make_probe(FAMILIES["llava"], models("llava")))
    clip = transformers.CLIPConfig(
        text_config={**VISION, "vocab_size": 64, "max_position_embeddings": 64}, vision_config=dict(VISION)
    )
    for model in (make_llama(), transformers.CLIPModel(clip), torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=rf"Stage 'vision_encoder' was not found in {type(model).__name__}.*`stages=`"
        ):
            vision_language_stages(model, batch)


@needs("transformers", "5.0")
@pytest.mark.parametrize(("stage", "name"), [("connector", "pooler_output"), ("vision_encoder", "hidden_states")])
def test_image_features_without_what_is_read(stage, name, models, monkeypatch):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model))
    original = model.model.get_image_features

    def without_it(pixel_values: Tensor, **kwargs: Any) -> Any:
        features = original(pixel_values, **kwargs)
        fields = {"hidden_states": features.hidden_states, "pooler_output": features.pooler_output}
        return transformers.modeling_outputs.BaseModelOutputWithPooling(**{**fields, name: None})

    monkeypatch.setattr(model.model, "get_image_features", without_it)
    with pytest.raises(ValueError, match=f"Stage '{stage}' was not found in Llava"), side_effect_free(model):
        vision_language_stages(model, batch)


def test_before_transformers_5_it_is_said_that_this_is_needed(models, monkeypatch):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model))
    # As it is there.
    monkeypatch.setattr(metadata, "version", lambda package: "4.57.1")
    monkeypatch.setattr(model.model, "get_image_features", lambda pixel_values, **_: list(torch.zeros(4, 9, 24)))
    told = (
        r"'vision_encoder' was not found in Llava.*: it needs transformers 5\.0 or newer, and in 4\.57\.1 .*`stages=`"
    )
    with pytest.raises(ValueError, match=told), side_effect_free(model):
        vision_language_stages(model, batch)
