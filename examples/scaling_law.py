"""Train a family of small Llamas on the same text, measure them, and fit the paper's power law of matrix entropy.

python examples/scaling_law.py             # seven sizes from 0.1 to 5.8 M parameters, under 20 minutes on 2 cores
python examples/scaling_law.py --quick     # a few steps of tiny models, to see that it runs

A size that is in the output folder already, trained for as many steps, is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pretrain_text import LENGTH, VOCABULARY, shipped_text, tokenize, train_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from matent_callbacks.scaling_law import fit_power_laws
from matent_callbacks.transformers import MatrixEntropyCallback

Sequences = list[dict[str, Any]]
SIZES = ((32, 2), (48, 3), (64, 4), (96, 4), (128, 5), (192, 5), (256, 5))  # width, layers
QUICK = ((16, 1), (32, 1), (48, 1))
BATCH = 16
PIECE = 600  # characters, about 190 tokens: nearly every held-out piece fills a sequence
FITS = ("normalized_sequence_matrix_entropy", "sequence_matrix_entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of 2,048 tokens, for every size (default: 300, quick: 3)")
    parser.add_argument("--quick", action="store_true", help="three tiny sizes and 20 held-out texts")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling_law"))
    arguments = parser.parse_args()
    sizes, steps = (QUICK, 3) if arguments.quick else (SIZES, 300)
    steps = arguments.steps or steps
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    texts = pieces(shipped_text())
    held_out, train = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    held_out = held_out[:20] if arguments.quick else held_out
    text = output / "held_out.jsonl"
    text.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in held_out), encoding="utf-8")
    bpe = train_tokenizer(train, special_tokens=("<pad>",))
    bpe.save(str(output / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(output / "tokenizer.json"), pad_token="<pad>", model_max_length=LENGTH
    )
    parts = tokenize(train, bpe), tokenize(held_out, bpe)
    print(f"{len(parts[0])} sequences of {LENGTH} tokens to train on, {len(parts[1])} held out", flush=True)

    losses: dict[str, float] = {}
    folders = [output / f"llama-{width}x{layers}" for width, layers in sizes]
    for (width, layers), folder in zip(sizes, folders, strict=True):
        start = time.perf_counter()
        losses[str(folder)] = loss = train_size(width, layers, steps, *parts, folder, tokenizer)
        print(f"{folder.name}: held-out loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    (output / "held_out_loss.json").write_text(json.dumps(losses, indent=2), encoding="utf-8")

    results = output / "results.json"
    results.unlink(missing_ok=True)  # `measure` resumes from what it finds, and would keep models of an earlier run
    measuring = ("--text", text, "--field", "text", "--max-length", LENGTH, "--untrained", "--seed", 0)
    matent("measure", *folders, *measuring, "--out", results)
    for metric in FITS:
        matent("scaling", results, "--y", metric, "--plot", output / f"{metric}.png", refusal_is_fine=True)
    summary(json.loads(results.read_text(encoding="utf-8"))["models"], losses)


def pieces(documents: Any) -> list[str]:
    """Join the documents' paragraphs into pieces of at least ``PIECE`` characters."""
    found, piece = [], ""
    for paragraph in "\n\n".join(documents).split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= PIECE:
            found.append(piece)
            piece = ""
    return found


def train_size(
    width: int, layers: int, steps: int, train: Sequences, held_out: Sequences, folder: Path, tokenizer: Any
) -> float:
    """Train one model, save it with its tokenizer, and return its held-out loss in nats per token."""
    record = folder / "held_out_loss.json"
    if record.exists() and (kept := json.loads(record.read_text(encoding="utf-8")))["steps"] == steps:
        return float(kept["loss"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(width // 32, 1),
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    every = max(steps // 20, 1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 15,
            weight_decay=0.1,
            logging_steps=every,
            include_num_input_tokens_seen="all",
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[MatrixEntropyCallback(every, probe=default_data_collator(held_out[:32]), during_eval=False)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = float(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    trainer.save_state()
    record.write_text(json.dumps({"steps": steps, "loss": loss}), encoding="utf-8")
    return loss


def matent(*arguments: object, refusal_is_fine: bool = False) -> None:
    """Run the command line as a user does; ``matent scaling`` exits with 1 if it has nothing to fit."""
    command = [sys.executable, "-m", "matent_callbacks", *map(str, arguments)]
    print("\n$ matent", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code and not (refusal_is_fine and code == 1):
        sys.exit(code)


def summary(models: list[dict[str, Any]], losses: dict[str, float]) -> None:
    """Print what the fits do not show: the untrained models, Diff-eRank and the held-out loss, side by side."""
    columns = ("H", "H/log d", "H_0/log d", "eRank", "eRank_0", "Diff-eRank", "loss")
    rows = []
    for model in models:
        last = {name: entry["value"] for name, entry in model["layers"]["last"].items()}
        entropy, rank = last["sequence_matrix_entropy"], last["sequence_effective_rank"]
        before, before_rank = last["untrained_sequence_matrix_entropy"], last["untrained_sequence_effective_rank"]
        log_d = math.log(model["hidden_size"])
        values = (entropy, entropy / log_d, before / log_d, rank, before_rank, last["diff_erank"])
        rows.append((*values, losses[model["model"]]))
    print(f"\n{'model':14} {'parameters':>10}  " + " ".join(f"{name:>10}" for name in columns))
    for model, row in zip(models, rows, strict=True):
        name = Path(model["model"]).name
        print(f"{name:14} {model['parameters']:10,}  " + " ".join(f"{value:10.3f}" for value in row))
    fit = fit_power_laws([model["parameters"] for model in models], [row[2] for row in rows])[0]
    constant = "" if fit.c is None else f", c = {fit.c.value:.3g}"
    print(
        f"The same fit to the models before training, H_0/log d: a = {fit.a.value:.3g}, "
        f"b = {fit.b.value:.4f} ({fit.b.low:.4f} to {fit.b.high:.4f}){constant}"
    )
    print("Order of pairs of models that each quantity shares with the held-out loss (Kendall's tau):")
    for name, column in zip(columns[:-1], zip(*rows, strict=True), strict=False):
        pairs = list(itertools.combinations(zip(column, [row[-1] for row in rows], strict=True), 2))
        tau = sum(math.copysign(1, (a - b) * (c - d)) for (a, c), (b, d) in pairs) / len(pairs)
        print(f"  {name:10} {tau:+.2f}")


if __name__ == "__main__":
    main()
