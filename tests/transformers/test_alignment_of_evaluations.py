"""Alignment of the first pairs of what a Trainer evaluates, where no probe was given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from matent_callbacks import measure_alignment
from matent_callbacks.transformers import AlignmentCallback
from tests.pairs import clip_examples, collate_pairs, make_clip

EXAMPLES = clip_examples(64)
X, Y, TRAIN = EXAMPLES[3:23], EXAMPLES[30:50], EXAMPLES[50:]
KEY = "alignment/modality_gap"


class Clip(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        output = model(**inputs, return_loss=True)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return None, None, None


def make_trainer(folder: Path, callback: Any, evaluated: Any, **settings: Any) -> Any:
    arguments = {
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no" if evaluated is None else "steps",
        "eval_steps": 2,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return Clip(
        model=make_clip(),
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=TRAIN,
        eval_dataset=evaluated,
        data_collator=collate_pairs,
        callbacks=[callback],
    )


def of(examples: Any, count: int = 16) -> float:
    return measure_alignment(make_clip(), collate_pairs(list(examples)[:count]), k=4)[KEY]


def logged(trainer: Any) -> dict[str, float]:
    return {key: value for record in trainer.state.log_history for key, value in record.items() if KEY in key}


def test_each_evaluation_set_is_measured_on_its_own_pairs_and_training_on_the_first(tmp_path):
    trainer = make_trainer(tmp_path, AlignmentCallback(1, k=4, on_error="raise"), {"x": X, "y": Y})
    trainer.train()
    assert abs(of(X) - of(Y)) > 1e-3
    expected = {KEY: of(X), f"eval_x_{KEY}": of(X), f"eval_y_{KEY}": of(Y)}
    assert logged(trainer) == pytest.approx(expected, abs=1e-5)
    other = trainer.evaluate(Y, metric_key_prefix="eval_other")
    assert other[f"eval_other_{KEY}"] == pytest.approx(of(Y), abs=1e-5)
    assert trainer.predict(TRAIN).metrics[f"test_{KEY}"] == pytest.approx(of(TRAIN), abs=1e-5)


def test_training_without_evaluation_data_stays_on_training_pairs_whatever_is_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, AlignmentCallback(1, k=4), None)
    trainer.train()
    assert logged(trainer) == pytest.approx({KEY: of(TRAIN)}, abs=1e-5)
    assert trainer.evaluate(Y)[f"eval_{KEY}"] == pytest.approx(of(Y), abs=1e-5)


def test_a_probe_of_the_users_is_measured_in_every_evaluation(tmp_path):
    callback = AlignmentCallback(1, k=4, probe=collate_pairs(TRAIN))
    trainer = make_trainer(tmp_path, callback, {"x": X, "y": Y})
    trainer.train()
    assert set(logged(trainer)) == {KEY, f"eval_x_{KEY}", f"eval_y_{KEY}"}
    assert all(value == pytest.approx(of(TRAIN), abs=1e-5) for value in logged(trainer).values())


class Once(torch.utils.data.IterableDataset):
    """What it gives is gone then."""

    def __init__(self) -> None:
        self.left = iter(Y)

    def __iter__(self) -> Any:
        return self.left


def text_only() -> list[Any]:
    return [{"input_ids": example["input_ids"]} for example in Y]


def collate_any(examples: list[Any]) -> Any:
    if "pixel_values" in examples[0]:
        return collate_pairs(examples)
    filled = collate_pairs([{**e, "pixel_values": torch.zeros(3, 12, 12)} for e in examples])
    return {key: value for key, value in filled.items() if key != "pixel_values"}


@pytest.mark.parametrize(("make", "steps"), [(Once, 2), (text_only, 1)])
def test_data_that_are_no_pairs_have_no_value_and_that_is_told_once(tmp_path, make, steps):
    trainer = make_trainer(tmp_path, AlignmentCallback(1, k=4), {"x": X, "other": make()}, eval_steps=steps)
    trainer.data_collator = collate_any
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert set(logged(trainer)) == {KEY, f"eval_x_{KEY}"}
    told = [str(w.message) for w in caught if "Monitoring failed" in str(w.message)]
    assert len(told) == 1
    assert "without the readings of the first pairs of 'eval_other'" in told[0]


def test_data_that_give_their_examples_once_are_not_taken_from_before_training(tmp_path):
    once = Once()
    trainer = make_trainer(tmp_path, AlignmentCallback(1, k=4), None)
    trainer.train_dataset = once
    with pytest.raises(ValueError, match="`probe` must be given, since the data can be read only once"):
        trainer.train()
    assert len(list(once.left)) == len(Y)


def test_a_data_set_whose_columns_the_trainer_removes_is_the_same_in_training_and_evaluation(tmp_path):
    import datasets

    rows = [{**e, "pixel_values": e["pixel_values"].tolist(), "caption": "text"} for e in X]
    collated = []

    def collate(examples: list[Any]) -> Any:
        assert "caption" not in examples[0]
        collated.append(len(examples))
        return collate_pairs(examples)

    callback = AlignmentCallback(1, k=4, num_pairs=13, on_error="raise")
    trainer = make_trainer(tmp_path, callback, datasets.Dataset.from_list(rows), remove_unused_columns=True)
    trainer.data_collator = collate
    trainer.train()
    trainer.evaluate()
    assert collated.count(13) == 1
    assert logged(trainer) == pytest.approx({KEY: of(X, 13), f"eval_{KEY}": of(X, 13)}, abs=1e-5)


def test_a_callback_that_finds_its_trainer_during_an_evaluation(tmp_path):
    callback = AlignmentCallback(1, k=4)
    trainer = make_trainer(tmp_path, AlignmentCallback(1, k=4, name="other"), X)
    trainer.callback_handler.callbacks.append(callback)
    assert trainer.evaluate(Y)[f"eval_{KEY}"] == pytest.approx(of(Y), abs=1e-5)
