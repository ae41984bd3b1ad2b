"""What the metric and the callback cost, as ratios of two things measured in turn in one process, medians of many.

Run with ``make bench`` or ``python benchmarks/speed.py``; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

from matent_callbacks import SequenceMatrixEntropy
from matent_callbacks.transformers import MatrixEntropyCallback

LAYERS, WIDTH, BATCH, LENGTH = 6, 256, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="training steps to time, half of them monitored")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs of 50 steps with and without the callback")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")

    rows = [
        ("slow definition / SequenceMatrixEntropy, 8 x 256 tokens, d=1024", definition_ratio(), "at least 50"),
        ("monitored step / plain step, all layers", monitored_step_ratio(arguments.steps), "at most 1.10"),
        ("run with every_n_steps=50 / run without, all layers", run_ratio(arguments.runs), "at most 1.01"),
    ]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, ")
    print(f"{platform.machine()}; Llama of {LAYERS} layers, d={WIDTH}, {BATCH} x {LENGTH} tokens\n")
    print("| ratio | measured | goal |\n|---|---|---|")
    for name, ratio, goal in rows:
        print(f"| {name} | {ratio:.3f} | {goal} |")


def definition_ratio() -> float:
    """The paper's procedure, sentence by sentence with a full SVD of the d x d covariance, over ours."""
    hidden = torch.randn(8, 256, 1024)

    def slow() -> None:
        for z in hidden:
            centred = z - z.mean(0)
            normalized = centred / centred.norm(dim=1, keepdim=True)
            covariance = normalized.T @ normalized / z.shape[0]
            values = torch.linalg.svd(covariance / covariance.trace())[1]
            torch.special.entr(values).sum().item()

    def ours() -> None:
        metric = SequenceMatrixEntropy()
        metric.update(hidden)
        metric.compute().item()

    return ratio_of_medians(slow, ours, rounds=7)


def monitored_step_ratio(steps: int) -> float:
    """One Trainer, every second step monitored."""
    timer = StepTimer()
    trainer = make_trainer([MatrixEntropyCallback(2, layers="all"), timer], steps)
    trainer.train()
    durations = timer.durations[4:]  # warm-up
    return statistics.median(durations[1::2]) / statistics.median(durations[0::2])


def run_ratio(pairs: int) -> float:
    """Whole runs of 50 steps in turn, with and without; the median of the ratios of the pairs."""

    def seconds(callbacks: list[Any]) -> float:
        trainer = make_trainer(callbacks, 50)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    seconds([])
    return statistics.median(seconds([MatrixEntropyCallback(50, layers="all")]) / seconds([]) for _ in range(pairs))


class StepTimer(transformers.TrainerCallback):  # type: ignore[misc]
    """Time from the beginning of each step to that of the next, logging included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(time.perf_counter())

    @property
    def durations(self) -> list[float]:
        return [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]


def make_trainer(callbacks: list[Any], steps: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    with tempfile.TemporaryDirectory() as folder:
        return transformers.Trainer(
            model=transformers.LlamaForCausalLM(config),
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                log_level="error",
                use_cpu=True,
            ),
            train_dataset=text_dataset(),
            data_collator=stack,
            callbacks=callbacks,
        )


def text_dataset() -> list[dict[str, list[int]]]:
    """The English text that ships with CPython, as characters."""
    text = "".join(topics[name] for name in sorted(topics))
    ids = [min(ord(character), 4095) for character in text]
    chunks = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    return [{"input_ids": chunk, "attention_mask": [1] * LENGTH, "labels": chunk} for chunk in chunks]


def stack(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def ratio_of_medians(first: Callable[[], None], second: Callable[[], None], *, rounds: int) -> float:
    """Both in turn; the first round warms up and does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, durations in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            durations.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


if __name__ == "__main__":
    main()
