"""Pretrain a small Llama on English text and watch its representations: one callback, nothing else special.

python examples/pretrain_text.py                          # the text that ships with CPython
python examples/pretrain_text.py my.txt --size medium     # your own
"""

from __future__ import annotations

import argparse
import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from matent_callbacks import EntropyMonitor
from matent_callbacks.plot import training_overview
from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback, ReadingPrinter

LENGTH = 128
VOCABULARY = 2048
SIZES = {"small": (128, 4), "medium": (192, 6), "large": (256, 6)}  # width, layers: about 1.3, 3.4 and 5.8 M parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="text files; none: the English text that ships with CPython")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="steps between two readings")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain_text"))
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "matent_callbacks")
    os.environ.setdefault("WANDB_DIR", str(arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)

    documents = [path.read_text(encoding="utf-8") for path in arguments.text] or list(shipped_text())
    sequences = tokenize(documents)
    held_out, train = sequences[::20], [s for i, s in enumerate(sequences) if i % 20]
    probe = default_data_collator(held_out[:32])

    torch.manual_seed(0)
    width, layers = SIZES[arguments.size]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(train)} sequences of {LENGTH} tokens")
    monitor = EntropyMonitor(model, layers="all", metrics=("sequence_matrix_entropy", "sequence_effective_rank"))
    monitor.read(probe)
    untrained = monitor.compute()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 15,
            weight_decay=0.1,
            logging_steps=arguments.every,
            eval_strategy="steps",
            eval_steps=max(arguments.steps // 4, 1),
            save_strategy="no",
            report_to="wandb",
            run_name=f"llama-{arguments.size}",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[
            MatrixEntropyCallback(arguments.every, layers="all", probe=probe),
            CollapseAlarm(),  # warns if a layer falls below a quarter of its highest effective rank, and stays there
            ReadingPrinter(),
        ],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    monitor.read(probe)
    print_table(monitor.layers, untrained, monitor.compute())
    picture = arguments.output / "overview.png"
    training_overview(
        trainer.state.log_history, title=f"Llama, {model.num_parameters() / 1e6:.1f} M parameters"
    ).savefig(picture, dpi=130)
    print(f"\nPicture: {picture}\nW&B run: wandb sync {arguments.output}/wandb/latest-run")


def shipped_text() -> Iterator[str]:
    """The language reference as pydoc has it, and the docstrings of the standard library."""
    yield from (topics[name] for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        yield "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, definitions))


def train_tokenizer(documents: list[str], special_tokens: tuple[str, ...] = ()) -> Any:
    """Train a byte-level BPE tokenizer on the documents."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents, vocab_size=VOCABULARY, special_tokens=list(special_tokens), show_progress=False
    )
    return tokenizer


def tokenize(documents: list[str], tokenizer: Any = None) -> list[dict[str, Any]]:
    """Cut the documents into sequences of equal length; without a tokenizer, one is trained on them."""
    tokenizer = tokenizer or train_tokenizer(documents)
    return cut([i for document in documents for i in tokenizer.encode(document).ids])


def cut(ids: list[int]) -> list[dict[str, Any]]:
    """Cut the tokens of all documents into sequences of equal length."""
    chunks = (ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH))
    return [{"input_ids": chunk, "attention_mask": [1] * LENGTH, "labels": chunk} for chunk in chunks]


def print_table(layers: tuple[str, ...], untrained: dict[str, float], trained: dict[str, float]) -> None:
    """Print the paper's data-set quantities on held-out text, before and after training."""
    print(f"\n{'':10}  {'entropy (nats)':>17}  {'effective rank':>17}")
    print(f"{'layer':10}  {'start':>8} {'end':>8}  {'start':>8} {'end':>8}  {'Diff-eRank':>10}")
    for layer in layers:
        entropy, rank = f"sequence_matrix_entropy/{layer}", f"sequence_effective_rank/{layer}"
        print(
            f"{layer:10}  {untrained[entropy]:8.3f} {trained[entropy]:8.3f}  {untrained[rank]:8.2f} "
            f"{trained[rank]:8.2f}  {untrained[rank] - trained[rank]:10.2f}"
        )


if __name__ == "__main__":
    main()
