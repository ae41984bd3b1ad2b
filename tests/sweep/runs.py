"""One run of training in either framework, whatever the way to train, with all that is to be compared written down."""

from __future__ import annotations

import csv
import gc
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from matent_callbacks.lightning import MatrixEntropyCallback as LightningCallback
from matent_callbacks.transformers import MatrixEntropyCallback as TrainerCallback
from tests.conftest import collate, llama, slow_entropy, slow_pooled_entropy, text_examples

STEPS, BATCH, TOKENS, EVERY = 6, 4, 16, 2
MONITORED = list(range(EVERY, STEPS + 1, EVERY))
STACK = ("layer_00", "layer_01", "last")
METRICS = ("matrix_entropy", "sequence_matrix_entropy")


@dataclass(frozen=True)
class Way:
    """A way to train."""

    accumulate: int = 1
    reentrant: bool | None = None
    """Gradient checkpointing, of which kind."""
    compiled: str = ""
    """``"whole"``: by the Trainer or around the model, ``"in place"`` or ``"blocks"``."""
    bf16: bool = False
    lora: bool = False
    packed: bool = False
    evaluate: bool = False
    resume: bool = False
    wandb: bool = False
    spoil: Callable[[Any], None] = lambda model: None
    """What goes wrong in the model."""

    def model(self) -> Any:
        """The model with its initial weights, as nothing but the way itself changes it."""
        model = llama(layers=2)
        self.spoil(model)
        if not self.lora:
            return model
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    def trained_model(self) -> Any:
        """The model as the user hands it over."""
        model = self.model()
        if self.compiled == "in place":
            model.compile(backend="eager")
        if self.compiled == "blocks":
            for block in model.model.layers:
                block.compile(backend="eager")
        return model

    @property
    def collate(self) -> Callable[..., Any]:
        return DataCollatorWithFlattening() if self.packed else collate

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


class Forward(NamedTuple):
    """What one forward depends on."""

    batch: dict[str, Tensor]
    weights: dict[str, Tensor]
    random: Tensor
    training: bool
    step: int
    """The optimizer step that a training forward is for; the last one made, in evaluation."""


@dataclass
class Record:
    """What a run did."""

    model: Any
    losses: list[float] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    readings: dict[int, dict[str, float]] = field(default_factory=dict)
    """By optimizer step."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    left: list[tuple[list[Any], int]] = field(default_factory=list)
    """After each batch: hooks on the model, and activations alive."""
    random: Tensor | None = None
    """The state of the generator at the end."""
    steps: int = 0
    """Optimizer steps made."""
    module: Any = None
    """The LightningModule around the model."""

    def forward(self, batch: dict[str, Any], step: int, *, training: bool) -> None:
        tensors = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.forwards.append(Forward(tensors, weights, torch.get_rng_state(), training, step))

    def look(self) -> None:
        self.left.append((hooks(self.model), activations()))

    def take(self, step: int, logged: Mapping[str, Any]) -> None:
        """The readings among what was logged at a step."""
        for prefix, readings in (("", self.readings), ("eval_", self.evaluations), ("val_", self.evaluations)):
            names = tuple(f"{prefix}{name}/" for name in (*METRICS, "nonfinite_tokens"))
            values = {k.removeprefix(prefix): float(v) for k, v in logged.items() if k.startswith(names) and v != ""}
            if values:
                readings.setdefault(step, {}).update(values)

    def end(self, steps: int) -> None:
        self.steps = steps
        self.random = torch.get_rng_state()
        gc.collect()
        self.look()


def hooks(model: nn.Module) -> list[Any]:
    """Every kind of hook on every module, and how the module is called."""
    return [
        (name, attribute, getattr(value, "__qualname__", None) or len(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if (attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and value)
        or attribute in ("_compiled_call_impl", "forward")
    ]


def activations() -> int:
    """Number of tensors of the shape of hidden states: no weight, batch or statistic has three axes.

    But the covariances of several layers, which a thread in the background may be decomposing at this moment, are one
    tensor ``(layers, d, d)``. No hidden states have as many tokens as features here.
    """
    return sum(1 for item in gc.get_objects() if type(item) is Tensor and item.ndim >= 3 and not _is_covariances(item))


def _is_covariances(item: Tensor) -> bool:
    return item.ndim == 3 and item.shape[1] == item.shape[2]


def expected(way: Way, forwards: list[Forward]) -> dict[str, float]:
    """The readings by definition: the hidden states that the model itself gives, and the slow procedure in float64."""
    documents: dict[str, list[Tensor]] = defaultdict(list)
    model = way.model()
    for forward in forwards:
        model.load_state_dict(forward.weights)
        model.train(forward.training)
        with torch.random.fork_rng(), torch.no_grad(), way.autocast():
            torch.set_rng_state(forward.random)
            hidden = model(**forward.batch, output_hidden_states=True, use_cache=False).hidden_states
        for name, states in zip(STACK, hidden, strict=True):
            documents[name] += _documents(states, forward.batch)
    pooled = {f"matrix_entropy/{name}": slow_pooled_entropy(rows) for name, rows in documents.items()}
    each = {
        f"sequence_matrix_entropy/{name}": sum(map(slow_entropy, rows)) / len(rows) for name, rows in documents.items()
    }
    return pooled | each


def _documents(states: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        return list(states[0].tensor_split(starts[1:]))
    valid = batch["attention_mask"].bool() & states.isfinite().all(-1)
    return [row[mask] for row, mask in zip(states, valid, strict=True)]


class _Trainer(transformers.Trainer):
    record: Record

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.record.forward(inputs, self.state.global_step + 1, training=True)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.record.losses.append(loss.item())
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.record.forward(inputs, self.state.global_step, training=False)
        return super().prediction_step(model, inputs, *args, **kwargs)


class _Look(transformers.TrainerCallback):
    def __init__(self, record: Record, stop_at: int) -> None:
        self.record = record
        self.stop_at = stop_at

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.record.look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.look()
        control.should_training_stop |= state.global_step == self.stop_at


def by_trainer(way: Way, folder: Path, callbacks: list[Any], record: Record, dataset: Any = None) -> None:
    """Train by the ``Trainer`` of transformers."""
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2} if way.resume else {"save_strategy": "no"}
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": way.accumulate,
        "gradient_checkpointing": way.reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": way.reentrant},
        "bf16": way.bf16,
        "eval_strategy": "steps" if way.evaluate else "no",
        "eval_steps": STEPS // 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "wandb" if way.wandb else "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **saving,
    }
    if way.compiled == "whole":
        arguments |= {"torch_compile": True, "torch_compile_backend": "eager"}
    # As the Trainer does by itself from 5.0 on. With a cache packed documents see each other.
    record.model.config.use_cache = False
    # Before 5.0 the arguments are written into the environment, from where every later Trainer has them.
    with mock.patch.dict(os.environ):
        parsed = transformers.TrainingArguments(**arguments)
        _train_by_trainer(way, parsed, callbacks, record, dataset)


def _train_by_trainer(
    way: Way, arguments: transformers.TrainingArguments, callbacks: list[Any], record: Record, dataset: Any
) -> None:
    for stop_at in (STEPS // 2, STEPS) if way.resume else (STEPS,):
        trainer = _Trainer(
            record.model,
            arguments,
            train_dataset=text_examples(STEPS * BATCH * way.accumulate, TOKENS) if dataset is None else dataset,
            eval_dataset=text_examples(2 * BATCH + 2, TOKENS, start=200),
            data_collator=way.collate,
            callbacks=[*callbacks, _Look(record, stop_at)],
        )
        trainer.record = record
        try:
            trainer.train(resume_from_checkpoint=way.resume and stop_at == STEPS)
        finally:
            record.end(trainer.state.global_step)
            for logged in trainer.state.log_history:
                record.take(logged["step"], logged)


class _Module(pl.LightningModule):
    def __init__(self, way: Way, record: Record) -> None:
        super().__init__()
        self.model = record.model
        if way.reentrant is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": way.reentrant})
        if way.compiled == "whole":
            self.model = torch.compile(record.model, backend="eager")
        self.record = record

    def on_train_epoch_start(self) -> None:
        # Lightning discards the gradients of an accumulation that the end of the data cut short.
        self.record.forwards = [f for f in self.record.forwards if f.step <= self.trainer.global_step]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.record.forward(batch, self.trainer.global_step + 1, training=True)
        loss = self.model(**batch, use_cache=False).loss
        self.record.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.record.forward(batch, self.trainer.global_step, training=False)
        self.log("val_loss", self.model(**batch, use_cache=False).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class _LookLast(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        pl_module.record.look()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # The other keys are those of an earlier step.
        logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val_")}
        pl_module.record.take(trainer.global_step, logged)


def by_lightning(way: Way, folder: Path, callbacks: list[Any], record: Record, dataset: Any = None) -> None:
    """Train by Lightning's ``Trainer``."""
    data = text_examples(STEPS * BATCH * way.accumulate, TOKENS) if dataset is None else dataset
    module = record.module = record.module or _Module(way, record)
    module.record = record
    torch.manual_seed(3)
    for stop_at in (STEPS // 2, STEPS) if way.resume else (STEPS,):
        logger = CSVLogger(folder, version=stop_at)
        trainer = pl.Trainer(
            max_steps=stop_at,
            accumulate_grad_batches=way.accumulate,
            precision="bf16-mixed" if way.bf16 else "32-true",
            val_check_interval=STEPS // 2 * way.accumulate,
            limit_val_batches=1.0 if way.evaluate else 0,
            num_sanity_val_steps=0,
            logger=[logger, *([WandbLogger(save_dir=folder, offline=True)] if way.wandb else [])],
            callbacks=[*callbacks, _LookLast()],
            default_root_dir=folder,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = (
            DataLoader(data, batch_size=BATCH, collate_fn=way.collate),
            DataLoader(text_examples(2 * BATCH + 2, TOKENS, start=200), batch_size=BATCH, collate_fn=way.collate),
        )
        resumed = way.resume and stop_at == STEPS
        try:
            trainer.fit(module, *loaders, ckpt_path=folder / "half.ckpt" if resumed else None)
            if way.resume:
                trainer.save_checkpoint(folder / "half.ckpt")
        finally:
            record.end(trainer.global_step)
            for path in Path(logger.log_dir).glob("metrics.csv"):
                with path.open() as file:
                    for row in csv.DictReader(file):
                        record.take(int(row["step"]) + 1, {k: v for k, v in row.items() if not k.startswith("val_")})


def train(
    framework: str, way: Way, folder: Path, callbacks: list[Any], record: Record | None = None, **more: Any
) -> Record:
    """Train once; what happened is in ``record`` also if this raises."""
    record = Record(way.trained_model()) if record is None else record
    # What is there before is no activation of this run, and there is much of it to look through.
    gc.freeze()
    try:
        FRAMEWORKS[framework][0](way, folder, callbacks, record, **more)
    finally:
        gc.unfreeze()
        if way.compiled:
            torch._dynamo.reset()
    return record


def assert_same(watched: Record, alone: Record) -> None:
    """Training, bit for bit, and what is left on the model after each batch."""
    assert watched.steps == alone.steps
    assert watched.losses == alone.losses
    weights, expected_weights = watched.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    assert torch.equal(watched.random, alone.random)
    assert watched.left == alone.left


def assert_right(way: Way, record: Record, *, steps: list[int], evaluations: list[int] | None = None) -> None:
    """The readings of the steps and of the evaluations, all of them and no others.

    Of the same forward bit for bit: what is left to tolerate is float32 statistics against float64.
    """
    assert sorted(record.readings) == steps
    assert sorted(record.evaluations) == (evaluations or [])
    for training, readings in ((True, record.readings), (False, record.evaluations)):
        for step, values in readings.items():
            forwards = [f for f in record.forwards if f.training == training and f.step == step]
            of_layers = {key: value for key, value in values.items() if key.split("/")[1] in STACK}
            assert of_layers == pytest.approx(expected(way, forwards), rel=1e-5)


FRAMEWORKS: dict[str, tuple[Callable[..., None], type]] = {
    "Trainer": (by_trainer, TrainerCallback),
    "Lightning": (by_lightning, LightningCallback),
}


def make_callback(framework: str, layers: Any = "all", **arguments: Any) -> Any:
    """The callback of the framework, which reads every other step."""
    return FRAMEWORKS[framework][1](EVERY, layers, metrics=METRICS, **arguments)
