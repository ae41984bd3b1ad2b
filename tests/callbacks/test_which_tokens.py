"""Sinks and labels under every adapter: the Hugging Face Trainer, Lightning, and a loop of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from matent_callbacks import LoopMonitor
from matent_callbacks.lightning import MatrixEntropyCallback as OfLightning
from matent_callbacks.transformers import CollapseAlarm
from matent_callbacks.transformers import MatrixEntropyCallback as OfTransformers
from tests.conftest import collate, llama, text_examples
from tests.lightning.test_matrix_entropy_callback import make_module
from tests.lightning.test_matrix_entropy_callback import make_trainer as make_lightning_trainer
from tests.monitor.test_sinks import a_sink

__all__ = ["make_lightning_trainer", "make_module"]

Run = Callable[[dict[str, dict[str, Any]]], dict[str, float]]
STEPS = 4
RANK = "effective_rank"


def batches() -> Iterator[dict[str, Tensor]]:
    """Examples of which only the second half is to be learnt, as the answer in a chat."""
    for number in range(STEPS):
        batch = collate(text_examples(4, start=4 * number))
        batch["labels"][:, :12] = -100
        yield batch


def answers(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"] != -100) & (batch["attention_mask"] > 0)


@pytest.fixture(params=["transformers", "transformers, smoothed labels", "lightning", "loop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Trains with several callbacks, by name and arguments, and returns what is logged at the last step."""

    def of_transformers(callbacks: dict[str, dict[str, Any]]) -> dict[str, float]:
        make = request.getfixturevalue("make_trainer")
        own = [OfTransformers(STEPS, name=name, layers="all", **settings) for name, settings in callbacks.items()]
        smoothing = 0.1 if "smoothed" in request.param else 0.0
        trainer = make(own, model=llama(dropout=0.0), max_steps=STEPS, label_smoothing_factor=smoothing)
        rows = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(4)]
        trainer.train_dataset, trainer.data_collator = rows, torch.utils.data.default_collate
        with a_sink(trainer.model):
            trainer.train()
        return {key: value for record in trainer.state.log_history for key, value in record.items()}

    def of_lightning(callbacks: dict[str, dict[str, Any]]) -> dict[str, float]:
        own = [OfLightning(STEPS, name=name, layers="all", **settings) for name, settings in callbacks.items()]
        module = request.getfixturevalue("make_module")(dropout=0.0)
        trainer = request.getfixturevalue("make_lightning_trainer")(callbacks=own, max_steps=STEPS)
        with a_sink(module.model):
            trainer.fit(module, torch.utils.data.DataLoader(list(batches()), batch_size=None))
        return {key: float(value) for key, value in trainer.callback_metrics.items()}

    def of_a_loop(callbacks: dict[str, dict[str, Any]]) -> dict[str, float]:
        model, logged = llama(dropout=0.0), dict[str, float]()
        own = [
            LoopMonitor(model, STEPS, "all", name=name, log=lambda values, step: logged.update(values), **settings)
            for name, settings in callbacks.items()
        ]
        with a_sink(model):
            for step, batch in enumerate(batches(), start=1):
                with own[0].step(step, batch=batch, ends=True), own[1].step(step, batch=batch, ends=True):
                    model(**batch).loss.backward()
        for monitor in own:
            monitor.close()
        return logged

    kinds = {"transformers": of_transformers, "lightning": of_lightning, "loop": of_a_loop}
    return kinds[request.param.partition(",")[0]]


def test_sinks_are_left_out_unless_asked_for(run):
    with pytest.warns(UserWarning, match=r"Attention sinks.* layer_01, layer_02") as told:
        logged = run({"without": {}, "with": {"exclude_sinks": False}})
    assert sum("Attention sinks" in str(warning.message) for warning in told) == 1
    assert logged[f"without/{RANK}/layer_01"] > 1.5 * logged[f"with/{RANK}/layer_01"]
    for layer in ("layer_00", "last"):
        assert logged[f"without/{RANK}/{layer}"] == logged[f"with/{RANK}/{layer}"]


@pytest.mark.filterwarnings("ignore:Attention sinks")
def test_only_tokens_with_labels_are_read(run):
    logged = run({"labels": {"tokens": "labels"}, "masked": {"mask": answers}})
    for layer in ("layer_00", "layer_01", "layer_02", "last"):
        assert logged[f"labels/{RANK}/{layer}"] == logged[f"masked/{RANK}/{layer}"]
        assert not math.isnan(logged[f"labels/{RANK}/{layer}"])


def test_the_alarm_is_silent_when_a_sink_is_born(make_trainer):
    """From the tenth step on the first token is longer than the others in the middle of the model."""
    alarms = {}
    for exclude in (True, False):
        model = llama(dropout=0.0, hidden=64)
        callbacks = [
            OfTransformers(1, layers="all", exclude_sinks=exclude),
            CollapseAlarm(floor=0.6, patience=6, action=(found := []).append),
        ]
        trainer = make_trainer(callbacks, model=model, max_steps=30, learning_rate=1e-5)
        steps = iter(range(10**6))

        def longer(module: Any, inputs: Any, output: Tensor, steps: Iterator[int] = steps) -> Tensor:
            factor = torch.ones(output.shape[1], 1)
            factor[0] = 1 if next(steps) < 10 else 300
            return output * factor

        handle = model.model.layers[0].register_forward_hook(longer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        handle.remove()
        alarms[exclude] = {alarm.key for alarm in found}
    assert alarms[True] == set()
    assert alarms[False] == {f"{RANK}/layer_01", f"{RANK}/layer_02"}
