"""A search over hyperparameters: one Trainer and one callback, many models."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.state import GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

from matent_callbacks.transformers import MatrixEntropyCallback, PlateauStopping
from tests.conftest import collate, llama, text_examples

RATES = [1e-3, 3e-2, 1e-4]
STEPS = 8


class Keeps(TrainerCallback):
    """The log of each training."""

    def __init__(self) -> None:
        self.logs: list[list[dict[str, Any]]] = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        timings = ("runtime", "per_second")
        self.logs.append([{k: v for k, v in record.items() if not k.endswith(timings)} for record in state.log_history])


def callbacks() -> list[Any]:
    probe = collate(text_examples(4, start=300))
    return [
        MatrixEntropyCallback(1, layers="all", probe=probe, reference="start"),
        MatrixEntropyCallback(2, metrics="rankme", background=True),
        PlateauStopping("effective_rank/last", min_delta=1.0, patience=1, mode="any", verbose=False),
    ]


def make_trainer(folder: Any, callbacks: list[Any], keeps: Keeps, rate: float = 1e-3) -> Trainer:
    def model_init(trial: Any = None) -> Any:
        return llama(layers=2, dropout=0.0)

    return Trainer(
        model_init=model_init,
        args=TrainingArguments(
            str(folder),
            max_steps=STEPS,
            learning_rate=rate,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        ),
        train_dataset=text_examples(4 * STEPS),
        eval_dataset=text_examples(10, start=200),
        data_collator=collate,
        callbacks=[*callbacks, keeps],
    )


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: Any) -> list[list[dict[str, Any]]]:
    """The logs of a Trainer and callbacks of its own for each trial."""
    keeps = Keeps()
    for rate in RATES:
        make_trainer(tmp_path_factory.mktemp("run"), callbacks(), keeps, rate).train()
    stops = [log[-1]["step"] for log in keeps.logs]
    assert min(stops) < STEPS, "a trial must stop early for this to say anything"
    assert len(set(stops)) > 1
    return keeps.logs


def test_with_optuna_each_trial_is_read_as_if_it_were_the_only_one(by_hand, tmp_path):
    optuna = pytest.importorskip("optuna")
    keeps = Keeps()
    trainer = make_trainer(tmp_path, callbacks(), keeps)
    objectives: list[dict[str, float]] = []

    def objective(metrics: dict[str, float]) -> float:
        objectives.append(metrics)
        return metrics["eval_effective_rank/last"]

    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", RATES)},
        compute_objective=objective,
        n_trials=len(RATES),
        direction="maximize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0),
    )
    tried = {log[0]["learning_rate"]: log for log in keeps.logs}
    assert len(tried) == len(objectives) == len(RATES)
    assert tried == {log[0]["learning_rate"]: log for log in by_hand}


def test_a_trainer_that_is_sent_to_a_worker_brings_its_callbacks(by_hand, tmp_path):
    # As Ray does for each of its trials.
    cloudpickle = pytest.importorskip("cloudpickle")
    # Accelerate shares the data loaders of earlier trainings in this process, and those cannot be sent.
    GradientState._reset_state()
    trainer = make_trainer(tmp_path, callbacks(), Keeps())
    trainer.model = None
    sent = cloudpickle.dumps(trainer)
    for rate, expected in zip(RATES, by_hand, strict=True):
        worker = cloudpickle.loads(sent)
        worker.args.learning_rate = rate
        worker.train()
        keeps = next(c for c in worker.callback_handler.callbacks if isinstance(c, Keeps))
        assert keeps.logs[-1] == expected
