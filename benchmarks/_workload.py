"""A Llama on the English text that ships with CPython, and a Trainer that switches callbacks between steps."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 4096
BATCH, LENGTH = 8, 128
TOKENS = BATCH * LENGTH


def make_model(width: int, layers: int, length: int = LENGTH) -> Any:
    """Create a model with shapes as in Llama: heads of width 64, an MLP 4 times as wide."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=length,
    )
    return transformers.LlamaForCausalLM(config)


def text_dataset() -> list[dict[str, list[int]]]:
    """Sequences of character codes."""
    text = "".join(topics[name] for name in sorted(topics))
    ids = [min(ord(character), VOCABULARY - 1) for character in text]
    chunks = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    return [{"input_ids": chunk, "attention_mask": [1] * LENGTH, "labels": chunk} for chunk in chunks]


def stack(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def batches() -> Iterator[dict[str, Tensor]]:
    """Yield batches of the text, over and over."""
    examples = text_dataset()
    while True:
        for start in range(0, len(examples) - BATCH, BATCH):
            yield stack(examples[start : start + BATCH])


class SwitchingTrainer(transformers.Trainer):  # type: ignore[misc]
    """Takes a step with one set of callbacks, then with another, and so on, and times each.

    One model in one thread: two Trainers would differ by several percent just because of where their memory lies.
    """

    def __init__(self, sets: Mapping[str, list[Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds: dict[str, list[float]] = {name: [] for name in sets}
        self._sets = sets
        self._round: list[str] = []
        self._random = random.Random(0)
        self._now = ""
        self._start = 0.0
        for callback in itertools.chain(*sets.values()):
            callback.attach(self)
            self.remove_callback(callback)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Called first in a step, and outside of events, during which the list of callbacks must not change.
        now = time.perf_counter()
        if self._now:
            self.seconds[self._now].append(now - self._start)
        self._round = self._round or self._random.sample(list(self._sets), len(self._sets))
        for callback in self._sets.get(self._now, []):
            self.remove_callback(callback)
        self._now = self._round.pop()
        for callback in self._sets[self._now]:
            callback.attach(self)
        self._start = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)


def seconds_in_turn(
    sets: Mapping[str, list[Any]], *, width: int, layers: int, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of a step with each set of callbacks, once per round; the order is drawn anew each time."""
    trainer = make_trainer(sets, width=width, layers=layers, steps=len(sets) * (warm_up + rounds) + 1)
    trainer.train()
    return {name: seconds[warm_up:] for name, seconds in trainer.seconds.items()}


def make_trainer(sets: Mapping[str, list[Any]], *, width: int, layers: int, steps: int) -> SwitchingTrainer:
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SwitchingTrainer(
            sets,
            model=make_model(width, layers),
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
        )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
