"""The Trainer's own log records are what they are without the callbacks, and every reading is under its step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import transformers
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.trainer_utils import EvalLoopOutput

from matent_callbacks.transformers import MatrixEntropyCallback, PlateauStopping, ReadingPrinter
from tests.conftest import collate, text_examples
from tests.wandb_history import read_history

KEY = "matrix_entropy/last"


def own_records(trainer: Any) -> list[dict[str, Any]]:
    """What the Trainer logs itself: without our keys, without records that hold nothing else, without timings."""
    timings = ("_runtime", "_per_second")
    records = [
        {k: v for k, v in record.items() if "/" not in k and not k.endswith(timings)}
        for record in trainer.state.log_history
    ]
    return [record for record in records if record.keys() - {"step", "epoch"}]


def steps_of(trainer: Any, key: str = KEY) -> list[int]:
    return [record["step"] for record in trainer.state.log_history if key in record]


WAYS = {
    "another interval": {"logging_steps": 4},
    "each epoch": {"logging_strategy": "epoch"},
    "never": {"logging_strategy": "no"},
    "the first step": {"logging_steps": 5, "logging_first_step": True},
    "a share of the run": {"logging_steps": 0.4},
    "accumulation and evaluation": {
        "logging_steps": 4,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    },
}


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_trainers_own_records_are_what_they_are_without(make_trainer, way, probe):
    def run(callbacks: list[Any]) -> tuple[Any, float]:
        trainer = make_trainer(callbacks, **{"max_steps": 10, **WAYS[way]})
        return trainer, trainer.train().training_loss

    plain, loss = run([])
    batch = collate(text_examples(4, start=200)) if probe else None
    read, loss_with = run([MatrixEntropyCallback(3, probe=batch)])
    assert own_records(read) == own_records(plain)
    assert len(own_records(plain)) >= 1
    assert loss_with == loss
    assert steps_of(read) == [3, 6, 9, *([10] if probe else [])]


def test_a_reading_is_in_the_record_of_its_step_where_there_is_one(make_trainer):
    trainer = make_trainer([MatrixEntropyCallback(3)], max_steps=12, logging_steps=4)
    trainer.train()
    assert {r["step"]: "loss" in r for r in trainer.state.log_history if KEY in r} == {
        3: False,
        6: False,
        9: False,
        12: True,
    }


def test_the_record_of_an_epoch_has_the_reading_of_its_last_step(make_trainer):
    trainer = make_trainer([MatrixEntropyCallback(3)], max_steps=12, logging_strategy="epoch", examples=24)
    per_epoch = 24 // trainer.args.per_device_train_batch_size
    trainer.train()
    with_loss = [r["step"] for r in trainer.state.log_history if "loss" in r]
    assert with_loss == list(range(per_epoch, 13, per_epoch))
    together = [r["step"] for r in trainer.state.log_history if KEY in r and "loss" in r]
    assert together == [step for step in with_loss if step % 3 == 0]
    assert together
    assert steps_of(trainer) == [3, 6, 9, 12]


def test_two_callbacks_share_a_record_of_their_own(make_trainer):
    callbacks = [MatrixEntropyCallback(2), MatrixEntropyCallback(4, layers=0)]
    trainer = make_trainer(callbacks, max_steps=8, logging_strategy="no")
    trainer.train()
    records = [r for r in trainer.state.log_history if any("/" in key for key in r)]
    assert [r["step"] for r in records] == [2, 4, 6, 8]
    assert ["matrix_entropy/layer_00" in r for r in records] == [False, True, False, True]


def test_every_reporter_has_a_record_of_its_own_under_its_step(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    reporters = ["wandb", "tensorboard"]
    trainer = make_trainer([MatrixEntropyCallback(3)], max_steps=8, logging_steps=4, report_to=reporters)
    trainer.train()
    wandb.finish()
    history = [row for row in read_history(tmp_path) if f"train/{KEY}" in row]
    logged = {r["step"]: r[KEY] for r in trainer.state.log_history if KEY in r}
    assert {row["train/global_step"]: row[f"train/{KEY}"] for row in history} == pytest.approx(logged)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars(f"train/{KEY}")} == pytest.approx(logged)
    assert list(logged) == [3, 6]


def test_a_plateau_stops_at_the_step_of_a_record_of_its_own(make_trainer):
    def stopped(**arguments: Any) -> int:
        stopping = PlateauStopping(KEY, min_delta=1e9, patience=2)
        trainer = make_trainer([MatrixEntropyCallback(2), stopping], max_steps=20, **arguments)
        trainer.train()
        return trainer.state.global_step

    assert stopped(logging_strategy="no") == stopped(logging_strategy="epoch") == stopped(logging_steps=1) < 20


def test_a_trainer_that_averages_between_its_records_keeps_its_averages(make_trainer):
    class Averages(transformers.Trainer):
        """As TRL's trainers do: `log` adds the averages since the last record, and begins new ones."""

        kept: list[float]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.kept = [*getattr(self, "kept", []), float(self.state.global_step)]
            return super().training_step(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self.kept:
                logs["average"] = sum(self.kept) / len(self.kept)
            self.kept = []
            super().log(logs, *args, **kwargs)

    def run(callbacks: list[Any]) -> Any:
        trainer = make_trainer(callbacks, max_steps=8, logging_steps=4, cls=Averages)
        trainer.train()
        return trainer

    read = run([MatrixEntropyCallback(3)])
    assert own_records(read) == own_records(run([]))
    assert steps_of(read) == [3, 6]


class TakesAnything(transformers.Trainer):
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        return super().evaluation_loop(*args, **kwargs)


class TakesMore(transformers.Trainer):
    def evaluation_loop(self, dataloader: Any, description: str, *rest: Any, extra: int = 0, **kwargs: Any) -> Any:
        return super().evaluation_loop(dataloader, description, *rest, **kwargs)


class PassesInOrder(transformers.Trainer):
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        loader = self.get_eval_dataloader(eval_dataset)
        output = self.evaluation_loop(loader, "Evaluation", None, ignore_keys, metric_key_prefix)
        self.log(output.metrics)
        return output.metrics


@pytest.mark.parametrize("cls", [TakesAnything, TakesMore, PassesInOrder])
def test_an_evaluation_loop_with_other_arguments(make_trainer, cls):
    trainer = make_trainer([MatrixEntropyCallback(100)], cls=cls)
    expected = make_trainer([MatrixEntropyCallback(100)]).evaluate()[f"eval_{KEY}"]
    assert trainer.evaluate()[f"eval_{KEY}"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(metric_key_prefix="dev")[f"dev_{KEY}"] == pytest.approx(expected, rel=1e-6)


class EvaluatesBetween(transformers.TrainerCallback):
    """Evaluates in the middle of an optimizer step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()


@pytest.mark.parametrize("between", [False, True])
def test_an_evaluation_inside_a_window_leaves_the_window_as_it_is(make_trainer, between):
    def read(*, during_eval: bool, window_steps: int = 6) -> tuple[float, bool]:
        # An evaluation draws random numbers, so there is one in each of these runs.
        arguments = {"gradient_accumulation_steps": 2} if between else {"eval_strategy": "steps", "eval_steps": 4}
        evaluates = EvaluatesBetween()
        callback = MatrixEntropyCallback(6, window_steps=window_steps, during_eval=during_eval)
        evaluates.trainer = make_trainer([callback, evaluates], max_steps=6, **arguments)
        evaluates.trainer.train()
        history = evaluates.trainer.state.log_history
        return next(r[KEY] for r in history if KEY in r), any(f"eval_{KEY}" in r for r in history)

    expected, was_read = read(during_eval=False)
    assert not was_read
    assert read(during_eval=True) == (expected, True)
    assert read(during_eval=True, window_steps=2)[0] != expected


@pytest.mark.parametrize("name", ["training_step", "prediction_step", "evaluation_loop", "_save_checkpoint"])
def test_a_method_patched_after_the_trainer_was_made_is_called(make_trainer, name):
    class Own(transformers.Trainer):
        pass

    trainer = make_trainer(
        [MatrixEntropyCallback(1)],
        cls=Own,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    original = getattr(transformers.Trainer, name)
    with mock.patch.object(Own, name, autospec=True, side_effect=original) as patched:
        trainer.train()
    assert patched.called
    assert trainer.state.log_history[0][KEY] > 0


def test_a_printer_patched_after_training_began_is_called(make_trainer):
    class Patches(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monkey.setattr(transformers.PrinterCallback, "on_log", lambda self, *a, **k: seen.append(k["logs"]))

    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as monkey:
        make_trainer([ReadingPrinter(), Patches()], max_steps=1, disable_tqdm=True).train()
    assert any("train_runtime" in logs for logs in seen)
