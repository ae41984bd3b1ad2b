"""Alignment on a real Trainer that trains a small LLaVA and a small CLIP."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from matent_callbacks import measure_alignment
from matent_callbacks.alignment.vision_language import vision_language_stages
from matent_callbacks.functional import (
    debiased_cka,
    linear_cka,
    matrix_entropy,
    modality_distance,
    modality_gap,
    modality_integration_rate,
    mutual_knn,
    pairing_z_score,
)
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback, PlateauStopping
from tests.pairs import IMAGE_TOKEN, clip_examples, collate_pairs, llava_examples, make_clip, make_llava, seeing_llava
from tests.versions import needs


def make_trainer(
    folder: Path, callbacks: list[Any], *, model: Any = None, examples: Any = None, **settings: Any
) -> Any:
    examples = examples or llava_examples(32)
    arguments = {
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "remove_unused_columns": False,
    }
    return Trainer(
        model=model or make_llava(),
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=examples,
        eval_dataset=examples[:16],
        data_collator=collate_pairs,
        callbacks=callbacks,
    )


def by_hand(model: Any, batch: Any) -> dict[str, float]:
    """exp of the mean entropy of each stage, sample by sample."""
    with torch.no_grad():
        stages, _ = vision_language_stages(model.eval(), batch)
    return {
        name: torch.stack([matrix_entropy(h[m]) for h, m in zip(*stages[name], strict=True)]).mean().exp().item()
        for name in STAGES
    }


@needs("transformers", "5.0")
def test_a_step_that_the_trainer_does_not_log_has_a_record_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, [AlignmentCallback(2)], logging_steps=3)
    trainer.train()
    read = {r["step"]: "loss" in r for r in trainer.state.log_history if "alignment/image_text" in r}
    assert read == {2: False, 4: False}
    assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [3]


@needs("transformers", "5.0")
def test_readings_of_a_vision_language_model(tmp_path):
    trainer = make_trainer(tmp_path, [AlignmentCallback(2, metrics=["effective_rank", "matrix_entropy"])])
    trainer.train()
    read = [r for r in trainer.state.log_history if "alignment/image_text" in r]
    assert [r["step"] for r in read] == [2, 4]
    assert all("loss" in r for r in read)
    # `probe=None`: the first 16 pairs of the evaluation data, through the Trainer's own collator.
    e = by_hand(trainer.model, collate_pairs(llava_examples(16)))
    last = read[-1]
    for name, value in e.items():
        assert last[f"effective_rank/{name}"] == pytest.approx(value, rel=1e-4)
        assert last[f"matrix_entropy/{name}"] == pytest.approx(torch.tensor(value).log().item(), rel=1e-4)
    three = [e["image"], e["text"], e["image_text"]]
    assert last["alignment/image_text"] == pytest.approx(sum(three) / 3 / max(three), rel=1e-4)
    ratio = (e["vision_encoder"] - e["connector"]) / e["vision_encoder"]
    assert last["alignment/image_reduction_ratio"] == pytest.approx(ratio, rel=1e-3, abs=1e-4)


MEASURED_AGAINST_CHANCE = ("cka_debiased", "cka_z", "mutual_knn", "mutual_knn_z", "grounding")


def mean_tokens(stages: Any, name: str) -> torch.Tensor:
    return torch.stack([h[m].mean(0) for h, m in zip(*stages[name], strict=True)])


@needs("transformers", "5.0")
def test_what_is_measured_against_chance(tmp_path):
    trainer = make_trainer(tmp_path, [AlignmentCallback(4, k=5)], model=seeing_llava())
    trainer.train()
    trainer.evaluate()
    last = next(r for r in trainer.state.log_history if "alignment/image_text" in r)
    batch = collate_pairs(llava_examples(16))
    model = trainer.model.eval()
    with torch.no_grad():
        stages, _ = vision_language_stages(model, batch)
        moved = {**batch, "pixel_values": batch["pixel_values"].roll(-1, 0)}
        moved_stages, _ = vision_language_stages(model, moved)
        grounding = model(**moved).loss - model(**batch).loss
    x, y = mean_tokens(stages, "image"), mean_tokens(stages, "text")
    assert abs(grounding) > 1e-2
    assert last["alignment/grounding"] == pytest.approx(grounding.item(), abs=1e-5)
    assert last["alignment/cka_debiased"] == pytest.approx(debiased_cka(x, y).item(), abs=1e-4)
    assert last["alignment/cka_z"] == pytest.approx(pairing_z_score(linear_cka, x, y).item(), abs=1e-3)
    assert last["alignment/mutual_knn"] == pytest.approx(mutual_knn(x, y, k=5).item())
    expected = pairing_z_score(lambda a, b: mutual_knn(a, b, k=5), x, y).item()
    assert last["alignment/mutual_knn_z"] == pytest.approx(expected, abs=1e-3)
    # Images and texts are those of the pairs: only the joint forward differs.
    three = [matrix_entropy(*moved_stages[name]).mean().exp() for name in ("image", "text", "image_text")]
    shifted = (sum(three) / 3 / max(three)).item()
    assert last["alignment/image_text_shift"] == pytest.approx(shifted - last["alignment/image_text"], abs=1e-5)
    assert not any(key.startswith("alignment/skipped") or key == "alignment/cka" for key in last)
    evaluated = next(r for r in trainer.state.log_history if "eval_loss" in r)
    assert evaluated["eval_alignment/grounding"] == pytest.approx(last["alignment/grounding"], abs=1e-6)


@needs("transformers", "5.0")
def test_wandb_sums_the_alignment_up_by_its_greatest_value_and_its_last(tmp_path, own_wandb):
    import wandb

    trainer = make_trainer(tmp_path, [AlignmentCallback(1)], report_to="wandb")
    trainer.train()
    for key in ("image_text", *MEASURED_AGAINST_CHANCE):
        values = [r[f"alignment/{key}"] for r in trainer.state.log_history if f"alignment/{key}" in r]
        summary = wandb.run.summary[f"train/alignment/{key}"]
        assert {"max": summary["max"], "last": summary["last"]} == {"max": max(values), "last": values[-1]}
    wandb.finish()


@needs("transformers", "5.0")
@pytest.mark.parametrize("key", ["alignment/grounding", "alignment/cka_z"])
def test_stopping_on_what_is_measured_against_chance(tmp_path, key):
    stopping = PlateauStopping(key, min_delta=100.0, patience=2, mode="max", verbose=False)
    trainer = make_trainer(tmp_path, [stopping, AlignmentCallback(1)], max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 6


@needs("transformers", "5.0")
def test_a_probe_without_labels_has_no_grounding_and_that_is_said_once(tmp_path):
    probe = collate_pairs(llava_examples(16))
    del probe["labels"]
    trainer = make_trainer(tmp_path, [AlignmentCallback(1, probe=probe, on_error="raise")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "alignment/" in str(w.message)]
    assert told == [
        "`alignment/grounding` is not logged: `probe` must have `labels` (B, T), and the model give logits."
    ]
    logged = {key for record in trainer.state.log_history for key in record}
    assert "alignment/image_text_shift" in logged
    assert "alignment/grounding" not in logged


@needs("transformers", "5.0")
@pytest.mark.parametrize(
    ("make", "examples", "kept"),
    [
        (make_llava, llava_examples, {"image_text", "image_reduction_ratio", "grounding", "image_text_shift"}),
        (make_clip, clip_examples, {"cka", "mutual_information", "modality_gap"}),
    ],
)
def test_fewer_than_four_pairs_are_told_in_one_sentence(tmp_path, make, examples, kept):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = measure_alignment(make(), collate_pairs(examples(3)))
    assert {key.removeprefix("alignment/") for key in values if key.startswith("alignment/")} == kept
    (told,) = (str(w.message) for w in caught if "alignment/" in str(w.message))
    assert told.startswith("`probe` holds 3 pairs of image and text, too few for ")
    assert "alignment/cka_z (4)" in told
    assert "alignment/mutual_knn_z (11)" in told


@needs("transformers", "5.0")
def test_images_without_an_equal_are_left_out_and_counted(tmp_path):
    # One of the four has two images.
    batch = collate_pairs(llava_examples(4))
    twice = batch["input_ids"][:, 1:10]
    more = [torch.cat([row, extra]) for row, extra in zip(batch["input_ids"], twice, strict=True)]
    ids = torch.stack(
        [more[0], *(torch.cat([row, torch.zeros(9, dtype=torch.long)]) for row in batch["input_ids"][1:])]
    )
    pixel_values = torch.cat([batch["pixel_values"][:1], batch["pixel_values"]])
    probe = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixel_values}
    probe["labels"] = ids.masked_fill((ids == 120) | (ids == 0), -100)
    model = seeing_llava().eval()
    values = measure_alignment(model, probe)
    assert values["alignment/skipped_no_equal"] == 1
    only = {key: value[2:] if key == "pixel_values" else value[1:] for key, value in probe.items()}
    moved = {**only, "pixel_values": only["pixel_values"].roll(-1, 0)}
    with torch.no_grad():
        expected = (model(**moved).loss - model(**only).loss).item()
    assert values["alignment/grounding"] == pytest.approx(expected, abs=1e-5)
    alone = measure_alignment(model, only)
    assert values["alignment/image_text_shift"] == pytest.approx(alone["alignment/image_text_shift"], abs=1e-5)
    single = measure_alignment(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)])
    assert single["alignment/skipped_no_equal"] == 4
    assert not {"alignment/grounding", "alignment/image_text_shift"} & set(single)


@needs("transformers", "5.0")
def test_a_batch_is_exchanged_within_itself():
    model, examples = seeing_llava().eval(), llava_examples(12)
    batches = [collate_pairs(examples[:5]), collate_pairs(examples[5:])]
    values = measure_alignment(model, batches)
    total = tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            moved = {**batch, "pixel_values": batch["pixel_values"].roll(-1, 0)}
            total += count * (model(**moved).loss - model(**batch).loss).item()
            tokens += count
    assert values["alignment/grounding"] == pytest.approx(total / tokens, abs=1e-5)


@needs("transformers", "5.0")
def test_pixels_that_are_not_finite_do_not_reach_the_other_losses():
    model, probe = seeing_llava().eval(), collate_pairs(llava_examples(6))
    clean = measure_alignment(model, probe)
    probe["pixel_values"][2] = float("nan")
    with pytest.warns(UserWarning, match="NaN or Inf"):
        values = measure_alignment(model, probe)
    assert values["alignment/grounding"] != clean["alignment/grounding"]
    assert abs(values["alignment/grounding"]) < 10


@needs("transformers", "5.0")
def test_no_second_forward_where_nothing_asks_for_it():
    model, probe = make_llava(), collate_pairs(llava_examples(12))
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    for measures, forwards in ((None, 3), (["cka", "cka_z"], 2), (["grounding"], 3), ([], 2)):
        calls.clear()
        values = measure_alignment(model, probe, pair_measures=measures)
        # One by itself for what the connector is given, one in each ordinary forward.
        assert len(calls) == forwards
        if measures is not None:
            found = {key for key in values if key.startswith("alignment/")}
            ratios = {"alignment/image_text", "alignment/image_reduction_ratio"}
            assert found == ratios | {f"alignment/{name}" for name in measures}


@needs("transformers", "5.0")
def test_modality_integration_rate_is_of_all_layers_after_the_embeddings(tmp_path):
    model, examples = make_llava(), llava_examples(8)
    batch = collate_pairs(examples)
    probe = [collate_pairs(examples[:5]), collate_pairs(examples[5:])]
    values = measure_alignment(model, probe, pair_measures=["mir", "mir_by_layer"])
    with torch.no_grad():
        states = model.eval()(**batch, output_hidden_states=True).hidden_states[1:]
    is_image = batch["input_ids"] == IMAGE_TOKEN
    is_text = ~is_image & (batch["attention_mask"] > 0)
    image, text = ([each[which] for each in states] for which in (is_image, is_text))
    assert values["alignment/mir"] == pytest.approx(modality_integration_rate(image, text).item(), rel=1e-5)
    names = [*(f"layer_{number:02d}" for number in range(1, len(states))), "last"]
    for name, own, others in zip(names, image, text, strict=True):
        expected = modality_distance(own, others).item()
        assert values[f"alignment/mir/{name}"] == pytest.approx(expected, rel=1e-4)
    # Unlike a measure of pairs, it is the same whatever image goes with a text.
    moved = {**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}
    other = measure_alignment(model, moved, pair_measures=["mir"])["alignment/mir"]
    assert other == pytest.approx(values["alignment/mir"], abs=0.05)
    trainer = make_trainer(tmp_path, [AlignmentCallback(2, probe=probe, pair_measures=["mir"])])
    trainer.train()
    assert sum("alignment/mir" in record for record in trainer.state.log_history) == 2


@needs("transformers", "5.0")
def test_basis_entropy_and_pair_measures(tmp_path):
    callback = AlignmentCallback(4, basis="entropy", pair_measures=["cka", "mutual_knn", "modality_gap"], k=3)
    trainer = make_trainer(tmp_path, [callback])
    trainer.train()
    last = next(r for r in trainer.state.log_history if "alignment/image_text" in r)
    batch = collate_pairs(llava_examples(16))
    e = {name: torch.tensor(value).log().item() for name, value in by_hand(trainer.model, batch).items()}
    three = [e["image"], e["text"], e["image_text"]]
    assert last["alignment/image_text"] == pytest.approx(sum(three) / 3 / max(three), rel=1e-4)
    with torch.no_grad():
        stages, _ = vision_language_stages(trainer.model.eval(), batch)
    x, y = (torch.stack([h[m].mean(0) for h, m in zip(*stages[name], strict=True)]) for name in ("image", "text"))
    assert last["alignment/cka"] == pytest.approx(linear_cka(x, y).item(), rel=1e-4)
    assert last["alignment/mutual_knn"] == pytest.approx(mutual_knn(x, y, k=3).item())
    assert last["alignment/modality_gap"] == pytest.approx(modality_gap(x, y).item(), rel=1e-4)


def test_readings_of_a_dual_encoder(tmp_path):
    examples = clip_examples(32)

    class Clip(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            output = model(**inputs, return_loss=True)
            return (output.loss, output) if return_outputs else output.loss

    trainer = make_trainer(tmp_path, [AlignmentCallback(4, k=4)], model=make_clip(), examples=examples)
    trainer.__class__ = Clip
    trainer.train()
    last = next(r for r in trainer.state.log_history if "alignment/cka" in r)
    batch = collate_pairs(examples[:16])
    model = trainer.model.eval()
    with torch.no_grad():
        output = model(**batch)
    x, y = output.image_embeds, output.text_embeds
    assert last["alignment/cka"] == pytest.approx(linear_cka(x, y).item(), rel=1e-4)
    assert last["alignment/mutual_knn"] == pytest.approx(mutual_knn(x, y, k=4).item())
    assert last["alignment/modality_gap"] == pytest.approx(modality_gap(x, y).item(), rel=1e-4)
    assert "alignment/mutual_information" in last
    text = output.text_model_output.last_hidden_state
    expected = matrix_entropy(text, batch["attention_mask"]).mean().exp().item()
    assert last["effective_rank/text_tower"] == pytest.approx(expected, rel=1e-4)
    image = output.vision_model_output.last_hidden_state
    assert last["effective_rank/image_tower"] == pytest.approx(matrix_entropy(image).mean().exp().item(), rel=1e-4)

    named = measure_alignment(model, batch, towers=("vision_model", "text_model"), k=4)
    assert len(named) == 9
    assert named == pytest.approx({key: last[key] for key in named})


def test_siglip_is_read_like_clip():
    from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = SiglipTextConfig(**tower, vocab_size=128, max_position_embeddings=32, projection_size=16)
    vision = SiglipVisionConfig(**tower, image_size=12, patch_size=4)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    batch = collate_pairs(clip_examples(12))
    values = measure_alignment(model, batch, k=3)
    with torch.no_grad():
        output = model(**batch)
    assert values["alignment/cka"] == pytest.approx(
        linear_cka(output.image_embeds, output.text_embeds).item(), rel=1e-4
    )
    assert {"effective_rank/image_tower", "effective_rank/text_tower"} <= set(values)


@needs("transformers", "5.0")
@pytest.mark.parametrize("measures", [None, ["cka", "mutual_information"]])
def test_training_is_bitwise_the_same(tmp_path, measures):
    def run(callbacks: list[Any]) -> tuple[list[float], Any, torch.Tensor]:
        trainer = make_trainer(
            tmp_path, callbacks, model=make_llava(), max_steps=6, eval_strategy="steps", eval_steps=3
        )
        trainer.train()
        logged = [r[key] for r in trainer.state.log_history for key in ("loss", "eval_loss") if key in r]
        return logged, trainer.model.state_dict(), torch.get_rng_state()

    losses, weights, rng = run([])
    losses_with, weights_with, rng_with = run([AlignmentCallback(2, pair_measures=measures, on_error="raise")])
    assert len(losses) == 8
    assert losses == losses_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert torch.equal(rng, rng_with)


@needs("transformers", "5.0")
def test_evaluation_best_model_and_stopping_on_the_plateau(tmp_path):
    trainer = make_trainer(
        tmp_path,
        [
            PlateauStopping("alignment/image_text", min_delta=10.0, patience=2, mode="any", verbose=False),
            AlignmentCallback(1),
            MatrixEntropyCallback(1),
        ],
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_alignment/image_text",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 6
    evaluated = [r["eval_alignment/image_text"] for r in trainer.state.log_history if "eval_alignment/image_text" in r]
    assert trainer.state.best_metric == max(evaluated)
    assert any("matrix_entropy/last" in r and "alignment/image_text" in r for r in trainer.state.log_history)
    alone = make_trainer(tmp_path, [], model=trainer.model)
    alone.add_callback(AlignmentCallback(1))
    assert "eval_alignment/image_text" in alone.evaluate()


@needs("transformers", "5.0")
def test_text_only_samples_are_skipped_and_counted(tmp_path):
    batch = collate_pairs(llava_examples(8))
    mixed = {key: torch.cat([value, value[:2]]) for key, value in batch.items()}
    mixed["input_ids"][8:][mixed["input_ids"][8:] == 120] = 5
    mixed["pixel_values"] = batch["pixel_values"]
    values = measure_alignment(make_llava(), mixed)
    expected = measure_alignment(make_llava(), batch)
    assert values.pop("alignment/skipped_text_only") == 2
    assert values == pytest.approx(expected, rel=1e-5)


@needs("transformers", "5.0")
def test_stages_of_ones_own(tmp_path):
    model = make_llava()
    probe = collate_pairs(llava_examples(8))
    given = {name: lambda model, batch, name=name: vision_language_stages(model, batch)[0][name] for name in STAGES}
    expected = measure_alignment(model, probe)
    of_numbers = {
        name: lambda model, batch, read=read: (read(model, batch)[0], read(model, batch)[1].long())
        for name, read in given.items()
    }
    for stages in (given, of_numbers, vision_language_stages):
        assert measure_alignment(model, probe, stages=stages) == expected
    mir = measure_alignment(model, probe, pair_measures=["mir"])
    assert measure_alignment(model, probe, pair_measures=["mir"], stages=given) == mir
    with pytest.raises(ValueError, match=r"`text`: `attention_mask` must have the shape of `hidden_states`"):
        measure_alignment(model, probe, stages={**given, "text": lambda m, b: (torch.randn(2, 3, 4), torch.ones(3))})
    with pytest.raises(ValueError, match=r"`stages` must have a function for each of vision_encoder, .* got"):
        AlignmentCallback(1, stages={"image": lambda m, b: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {k: v for k, v in b.items() if k != "pixel_values"}, "`pixel_values` must be in the batch"),
        (lambda b: {**b, "input_ids": b["input_ids"].clamp(max=100)}, "`input_ids` must hold image tokens"),
        pytest.param(
            lambda b: {**b, "pixel_values": b["pixel_values"][:3]},
            "`input_ids` must hold as many image tokens",
            marks=needs("transformers", "5.0"),
        ),
        (lambda b: {**b, "input_ids": b["input_ids"][:, 1:10], "attention_mask": b["attention_mask"][:, 1:10]}, "text"),
    ],
)
def test_a_probe_that_cannot_be_read_is_told_when_training_begins(tmp_path, change, message):
    probe = change(collate_pairs(llava_examples(4)))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [AlignmentCallback(1, probe=probe)]).train()


@needs("transformers", "5.0")
def test_nan_pixels_and_too_few_pairs_are_told(tmp_path):
    probe = collate_pairs(llava_examples(4))
    probe["pixel_values"][1] = float("nan")
    with pytest.warns(UserWarning, match=r"tokens of 'vision_encoder' are NaN or Inf"):
        values = measure_alignment(make_llava(), probe)
    clean = collate_pairs([e for i, e in enumerate(llava_examples(4)) if i != 1])
    expected = measure_alignment(make_llava(), clean)
    assert values["effective_rank/image"] == pytest.approx(expected["effective_rank/image"], rel=1e-4)
    one = collate_pairs(clip_examples(1))
    with pytest.raises(ValueError, match=r"`probe` must hold at least 11 pairs for cka, mutual_knn, .* got 1"):
        measure_alignment(make_clip(), one)


def test_unsupported_models_and_bad_arguments_are_told(tmp_path, make_llama):
    with pytest.raises(ValueError, match=r"Stage 'vision_encoder' was not found in LlamaForCausalLM.*Pass `stages=`"):
        measure_alignment(make_llama(), collate_pairs(llava_examples(2)))
    clip = make_clip()
    with pytest.raises(ValueError, match="`towers` asks for 'nothing'"):
        measure_alignment(clip, collate_pairs(clip_examples(12)), towers=("vision_model", "nothing"))
    assert not any(module._forward_hooks for module in clip.modules())
    for measure in ("grounding", "mir"):
        with pytest.raises(ValueError, match=rf"`pair_measures` of a dual encoder must be of cka, .* got '{measure}'"):
            measure_alignment(clip, collate_pairs(clip_examples(12)), pair_measures=[measure])
    with pytest.raises(ValueError, match="`probe` must hold at least one batch, got none"):
        measure_alignment(clip, [])
    for arguments, message in [
        ({"basis": "rank"}, "`basis` must be of effective_rank, entropy, got 'rank'"),
        ({"metrics": "rankme"}, "`metrics` must be of effective_rank, matrix_entropy, got 'rankme'"),
        ({"pair_measures": ["cca"]}, "`pair_measures` must be of cka, .* got 'cca'"),
        ({"num_pairs": 1}, "`num_pairs` must be at least 2, got 1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number above 0, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            AlignmentCallback(**arguments)
