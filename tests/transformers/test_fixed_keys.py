"""The keys of a Trainer's evaluations stay the same, whatever the hidden states hold."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback, PlateauStopping, ReadingPrinter

LAST = "effective_rank/last"


class Spoil(TrainerCallback):
    """From a step on, the final norm yields NaN: in all tokens, or in evaluation in the first of each sequence."""

    def __init__(self, model: Any, step: int, *, all_tokens: bool) -> None:
        self.step, self.on = step, False
        some = slice(None) if all_tokens else slice(1)

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not self.on or (module.training and not all_tokens):
                return None
            output = output.clone()
            output[:, some] = math.nan
            return output

        model.model.norm.register_forward_hook(spoil)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = state.global_step + 1 >= self.step


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_diverges_goes_on_with_its_monitored_key(make_llama, make_trainer, step):
    model = make_llama()
    trainer = make_trainer(
        [
            MatrixEntropyCallback(1, layers="all"),
            Spoil(model, step, all_tokens=True),
            EarlyStoppingCallback(early_stopping_patience=50),
            PlateauStopping(LAST, min_delta=0.1, patience=5),
            CollapseAlarm(LAST),
            ReadingPrinter(),
        ],
        model=model,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model=f"eval_{LAST}",
        load_best_model_at_end=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 4
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "NaN" in str(w.message)]
    assert re.search(r"all \d+ tokens are NaN or Inf in last", told[0])
    evaluations = [r for r in trainer.state.log_history if "eval_loss" in r]
    assert len({frozenset(record) for record in evaluations}) == 1
    for record in evaluations:
        assert math.isnan(record[f"eval_{LAST}"]) == (record["step"] >= step)
    assert [math.isnan(r[LAST]) for r in trainer.state.log_history if LAST in r] == [s >= step for s in (1, 2, 3, 4)]
    state = Path(trainer.args.output_dir, "checkpoint-4", "trainer_state.json")
    assert math.isnan(json.loads(state.read_text())["log_history"][-1][f"eval_{LAST}"])


def test_nan_that_appears_at_a_later_evaluation_adds_no_key_but_a_warning(make_llama, make_trainer):
    model = make_llama()
    trainer = make_trainer(
        [MatrixEntropyCallback(1), Spoil(model, 3, all_tokens=False)],
        model=model,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "left out of the readings of an evaluation" in str(w.message)]
    assert told == ["Tokens with NaN or Inf were left out of the readings of an evaluation: last (10)."]
    evaluations = [r for r in trainer.state.log_history if "eval_loss" in r]
    assert len(evaluations) == 4
    assert len({frozenset(record) for record in evaluations}) == 1
    assert not [key for record in evaluations for key in record if "nonfinite" in key]
    trainer.create_model_card()


def test_one_sequence_a_step_is_told_what_embeddings_need(make_trainer):
    metrics = ["matrix_entropy", "embedding_effective_rank"]
    trainer = make_trainer([MatrixEntropyCallback(1, metrics=metrics)], max_steps=3, per_device_train_batch_size=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    (told,) = (str(w.message) for w in caught if "Too few" in str(w.message))
    assert "no embedding_effective_rank of: last. It takes at least 2 sequences, and 1 came" in told
    values = [r for r in trainer.state.log_history if "matrix_entropy/last" in r]
    assert len(values) == 3
    assert all(math.isnan(record["embedding_effective_rank/last"]) for record in values)
