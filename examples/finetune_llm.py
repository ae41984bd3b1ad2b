"""Fine-tune a pretrained language model with LoRA, and see which layers of it change.

python examples/finetune_llm.py                 # on the language reference that ships with CPython
python examples/finetune_llm.py my.txt --steps 200
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pretrain_text import LENGTH, cut
from smollm2 import load
from transformers import Trainer, TrainingArguments, default_data_collator

from matent_callbacks import EntropyMonitor
from matent_callbacks.plot import series, step_curves
from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback, ReadingPrinter

RANK = "effective_rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="text files; none: the language reference of CPython")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two readings")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_llm"))
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "matent_callbacks")
    os.environ.setdefault("WANDB_DIR", str(arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load()
    documents = [path.read_text(encoding="utf-8") for path in arguments.text] or list(topics.values())
    sequences = tokenize(documents, tokenizer)
    held_out, train = sequences[::20], [s for i, s in enumerate(sequences) if i % 20]
    probe = default_data_collator(held_out[:8])

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    print(f"{len(train)} sequences of {LENGTH} tokens; ", end="", flush=True)
    model.print_trainable_parameters()
    # What the readings are like with the attention sinks is only of interest here: see docs/pretrained_models.md.
    with_sinks = EntropyMonitor(model, layers="all", metrics=RANK, exclude_sinks=False)
    without = EntropyMonitor(model, layers="all", metrics=RANK)
    before = measure(without, probe)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 10,
            logging_steps=arguments.every,
            eval_strategy="steps",
            eval_steps=max(arguments.steps // 3, 1),
            eval_on_start=True,
            save_strategy="no",
            report_to="wandb",
            run_name="smollm2-lora",
        ),
        train_dataset=train,
        eval_dataset=held_out[:32],
        callbacks=[
            MatrixEntropyCallback(arguments.every, layers="all", probe=probe, during_eval=False),
            CollapseAlarm(),
            ReadingPrinter(),
        ],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    profiles = {"base": before, "tuned": measure(without, probe), "tuned, with sinks": measure(with_sinks, probe)}
    print_table(without.layers, profiles)
    picture = arguments.output / "profile.png"
    draw(without.layers, profiles, trainer.state.log_history, picture)
    print(f"\nPicture: {picture}\nW&B run: wandb sync {arguments.output}/wandb/latest-run")


def tokenize(documents: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Cut the documents into sequences of equal length."""
    ids = [i for document in documents for i in tokenizer(document, add_special_tokens=False)["input_ids"]]
    return cut(ids)


def measure(monitor: EntropyMonitor, probe: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the effective rank of each layer."""
    monitor.read(probe)
    return {key.removeprefix(f"{RANK}/"): value for key, value in monitor.compute().items()}


def print_table(layers: tuple[str, ...], profiles: dict[str, dict[str, float]]) -> None:
    """Print the profile by depth, and what has moved."""
    print(f"\n{'effective rank':14}" + "".join(f"{name:>20}" for name in profiles) + f"{'change':>10}")
    for layer in layers:
        values = [profile[layer] for profile in profiles.values()]
        change = values[1] / values[0] - 1
        print(f"{layer:14}" + "".join(f"{value:20.1f}" for value in values) + f"{change:10.1%}")


def draw(layers: tuple[str, ...], profiles: dict[str, dict[str, float]], log: list[Any], picture: Path) -> None:
    """Draw the profile by depth beside the losses and the layers that moved most."""
    import matplotlib.pyplot as plt

    moved = sorted(layers, key=lambda layer: -abs(profiles["tuned"][layer] / profiles["base"][layer] - 1))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for (name, profile), style in zip(profiles.items(), ("--", "-", ":"), strict=True):
        left.plot([profile[layer] for layer in layers], style, label=name)
    left.set(title="Effective rank by depth", xlabel="layer; 0: embeddings, the last: after the norm", yscale="log")
    left.set_xticks([*range(0, len(layers) - 2, 5), len(layers) - 1], [*range(0, len(layers) - 2, 5), "last"])
    left.set_ylabel("dimensions")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False)
    losses = {"training": series(log, "loss"), "held out": series(log, "eval_loss")}
    step_curves(losses, ax=middle, unit="loss (nats per token)", points=["held out"])
    middle.set_title("Loss")
    middle.legend(frameon=False)
    ranks = {layer: series(log, f"{RANK}/{layer}") for layer in sorted(moved[:4])}
    step_curves(ranks, ax=right, unit="dimensions", ranks=True)
    right.set_title("The four layers that moved most")
    right.legend(frameon=False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
