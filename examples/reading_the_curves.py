"""Three runs of a small Llama: a healthy one, one that collapses, one that overfits. Draws a picture of each.

python examples/reading_the_curves.py                    # all runs, then effective rank at several sequence lengths
python examples/reading_the_curves.py --only collapse    # one of: healthy, collapse, overfitting, lengths
python examples/reading_the_curves.py --alarm            # with an alarm, which warns of a collapse of the last layer
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from pretrain_text import LENGTH, VOCABULARY, shipped_text, tokenize
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from matent_callbacks import EffectiveRank, EntropyMonitor, SequenceEffectiveRank
from matent_callbacks.plot import series, training_overview
from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback

Sequences = list[dict[str, Any]]
WIDTH = 96  # with 4 layers: 0.8 M parameters
METRICS = ("matrix_entropy", "effective_rank", "sequence_effective_rank")
EMBEDDINGS = "embedding_effective_rank"
# Title, number of training sequences (None: all), and what differs in the training arguments.
RUNS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "healthy": ("Healthy: learning rate 2e-3 with warm-up", None, {}),
    "collapse": ("Collapse: constant learning rate 0.1", None, {"learning_rate": 0.1, "lr_scheduler_type": "constant"}),
    "overfitting": ("Overfitting: 256 training sequences, again and again", 256, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reading_the_curves"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", choices=[*RUNS, "lengths"])
    parser.add_argument("--alarm", action="store_true", help="tell of a collapse, and mark it in the pictures")
    arguments = parser.parse_args()
    sequences = tokenize(list(shipped_text()))
    held_out, train = sequences[::20], [s for i, s in enumerate(sequences) if i % 20]
    print(f"Held-out loss when only token frequencies are known: {frequency_loss(train, held_out[:64]):.3f}")
    for name in RUNS:
        if arguments.only in (None, name):
            run(name, train, held_out, arguments.output, arguments.steps, alarm=arguments.alarm)
    if arguments.only in (None, "lengths"):
        folder = arguments.output / "healthy"
        if not (folder / "config.json").exists():
            run("healthy", train, held_out, arguments.output, arguments.steps)
        lengths(LlamaForCausalLM.from_pretrained(folder), held_out)


def run(name: str, train: Sequences, held_out: Sequences, output: Path, steps: int, *, alarm: bool = False) -> None:
    """Train one model, draw its picture and print its numbers."""
    title, count, settings = RUNS[name]
    train = train[:count]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=3,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    monitor = EntropyMonitor(model, layers="all", metrics=METRICS)
    monitor.read(probe := collate(held_out[:32]))
    # With one vector per sequence, many sequences are needed: all of the held-out ones.
    sentences = [collate(held_out[i : i + 32]) for i in range(0, len(held_out), 32)]
    of_sentences = EntropyMonitor(model, metrics=EMBEDDINGS)
    of_sentences.read(sentences)
    embeddings = {f"sentences/{key}": value for key, value in of_sentences.compute().items()}
    untrained = {"step": 0, **monitor.compute(), **embeddings}
    usual = {"learning_rate": 2e-3, "warmup_steps": steps // 15, "lr_scheduler_type": "cosine"}
    every, eval_every = max(steps // 40, 1), max(steps // 10, 1)
    callbacks: list[Any] = [
        MatrixEntropyCallback(every, layers="all", metrics=METRICS, probe=probe, during_eval=False),
        MatrixEntropyCallback(eval_every, metrics=EMBEDDINGS, probe=sentences, during_eval=False, name="sentences"),
    ]
    if alarm:
        # A run may have collapsed by its first reading, so it is compared with the model before training.
        callbacks.append(CollapseAlarm("effective_rank/last", relative_to=untrained["effective_rank/last"]))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / name),
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            weight_decay=0.1,
            logging_steps=every,
            eval_strategy="steps",
            eval_on_start=True,
            eval_steps=eval_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            **(usual | settings),
        ),
        train_dataset=train,
        eval_dataset=held_out[:64],
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()

    records = [untrained, *trainer.state.log_history]
    draw(records, title, output / f"curves_{name}.png")
    print(f"\n{title}\n\n{'':5}  {'loss (nats per token)':^21}  {'of the last layer':^43}")
    print(
        f"{'step':>5}  {'training':>10} {'held-out':>10} {'entropy':>10} {'eff. rank':>10} {'sentences':>10} "
        f"{'Diff-eRank':>10}"
    )
    entropy, rank, sequence_rank = (f"{metric}/last" for metric in METRICS)
    names = ["loss", "eval_loss", entropy, rank, f"sentences/{EMBEDDINGS}/last", sequence_rank]
    columns = [dict(zip(*series(records, key), strict=True)) for key in names]
    for step in columns[1]:  # where there was an evaluation
        numbers = [f"{column[step]:10.3f}" if step in column else f"{'-':>10}" for column in columns[:-1]]
        print(f"{step:5}  {' '.join(numbers)} {columns[-1][0] - columns[-1][step]:10.2f}", flush=True)
    monitor.read(collate(train[:32]))
    print(f"At the end, effective rank on training text: {monitor.compute()['effective_rank/last']:.2f}")


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the overview of a run, with the same scales for all runs."""
    figure = training_overview(records, title=title)
    heat_map, loss, _, entropy = figure.axes
    heat_map.collections[0].set_clim(1, WIDTH)
    loss.set_ylim(0, 8)
    entropy.set_ylim(0, math.log(WIDTH))
    figure.savefig(path, dpi=110)


def lengths(model: Any, held_out: Sequences) -> None:
    """Print effective ranks of one model, and of noise that fills all dimensions, for tokens cut in different ways."""
    tokens = torch.tensor([sequence["input_ids"] for sequence in held_out]).flatten()
    monitor = EntropyMonitor(model, metrics=METRICS)
    torch.manual_seed(0)
    print(f"\nEffective rank of the last layer, d = {WIDTH}\n\n{'':25}  {'healthy model':^15}  {'noise':^15}")
    print(f"{'length':>6} {'sequences':>9} {'tokens':>8}  {'pooled':>7} {'per seq':>7}  {'pooled':>7} {'per seq':>7}")
    for length, count in [(16, 256), (32, 128), (64, 64), (128, 32), (128, 1), (128, 4), (128, 16), (128, 128)]:
        monitor.read({"input_ids": tokens[: count * length].view(count, length)})
        values = monitor.compute()
        noise = torch.randn(count, length, WIDTH)
        pooled, each = EffectiveRank()(noise), SequenceEffectiveRank()(noise)
        print(
            f"{length:6} {count:9} {count * length:8}  {values['effective_rank/last']:7.1f} "
            f"{values['sequence_effective_rank/last']:7.1f}  {pooled:7.1f} {each:7.1f}"
        )


def frequency_loss(train: Sequences, held_out: Sequences) -> float:
    """Cross-entropy of the held-out tokens under the token frequencies of the training text, in nats."""
    seen, new = (torch.tensor([s["input_ids"] for s in part]).flatten() for part in (train, held_out))
    counts = torch.bincount(seen, minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[new].mean().item()


if __name__ == "__main__":
    main()
