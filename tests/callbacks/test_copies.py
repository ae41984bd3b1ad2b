"""Copies of callbacks, pickled or not, attached or not: unattached, with the arguments, and each works on its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import matent_callbacks.lightning as of_lightning
import matent_callbacks.transformers as of_transformers
from matent_callbacks.functional.alignment import STAGES
from tests.conftest import collate, text_examples
from tests.sweep.runs import FRAMEWORKS, STEPS, Record, Way, assert_same, train

PACKAGES: dict[str, ModuleType] = {"Trainer": of_transformers, "Lightning": of_lightning}


def through_pickle(callback: Any) -> Any:
    return pickle.loads(pickle.dumps(callback))


def embedded(model: Any, batch: Any) -> Any:
    return model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]


def entropy(package: ModuleType) -> list[Any]:
    return [package.MatrixEntropyCallback(2, "all", background=True)]


def on_probe(package: ModuleType) -> list[Any]:
    probe = collate(text_examples(4, start=300))
    return [package.MatrixEntropyCallback(2, "all", probe=probe, reference="start")]


def alignment(package: ModuleType) -> list[Any]:
    return [package.AlignmentCallback(2, stages=dict.fromkeys(STAGES, embedded), pair_measures=[])]


def stopping(package: ModuleType) -> list[Any]:
    observed = package.PlateauStopping("matrix_entropy/last", min_delta=99.0, patience=1, mode="any", verbose=False)
    return [package.MatrixEntropyCallback(1), observed]


Outcome = tuple[list[float], int, dict[str, float]]


def fit(framework: str, folder: Path, callbacks: list[Any], record: Record | None = None) -> Outcome:
    """Losses, steps, and all that was logged last."""
    logged: dict[str, float] = {}
    record = record or Record(Way().trained_model())
    record.take = lambda step, values: logged.update(  # type: ignore[method-assign]
        {k: float(v) for k, v in values.items() if "/" in k and v != ""}
    )
    train(framework, Way(evaluate=True), folder, callbacks, record)
    return record.losses, record.steps, logged


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("make", [entropy, on_probe, alignment, stopping])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_copies_work_in_trainers_of_their_own_and_so_does_what_they_were_made_of(framework, make, copied, tmp_path):
    package = PACKAGES[framework]
    given = make(package)
    before = copied(given) if copied is not copy.copy else list(map(copy.copy, given))
    expected = fit(framework, tmp_path / "given", given)
    assert expected[2]
    # Now they are attached, and have read, observed and stopped.
    after = copied(given) if copied is not copy.copy else list(map(copy.copy, given))
    assert all(getattr(callback, "trainer", None) is None for callback in [*before, *after])
    for name, callbacks in (("before", before), ("after", after), ("again", list(map(copied, after)))):
        assert fit(framework, tmp_path / name, callbacks) == expected
    if make is not stopping:
        assert fit(framework, tmp_path / "given again", given) == expected


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_copy_made_in_the_middle_of_a_run_leaves_the_run_as_it_is(framework, tmp_path):
    package = PACKAGES[framework]

    def run(folder: str, *, copying: bool) -> tuple[Record, list[Any], Outcome]:
        callbacks, copies = entropy(package), []
        record = Record(Way().trained_model())

        def pre_hook(module: Any, args: Any) -> None:
            # A reading is under way, and another in the background.
            copies.extend(through_pickle(callbacks) + copy.deepcopy(callbacks))

        handle = record.model.model.layers[1].register_forward_pre_hook(pre_hook) if copying else None
        outcome = fit(framework, tmp_path / folder, callbacks, record)
        if handle:
            handle.remove()
        return record, copies, outcome

    watched, copies, outcome = run("copying", copying=True)
    alone, _, expected = run("alone", copying=False)
    assert outcome == expected
    watched.left = alone.left = []
    assert_same(watched, alone)
    assert len(copies) >= 2 * STEPS
    assert fit(framework, tmp_path / "copy", [copies[-1]]) == expected


def test_a_copy_does_not_hold_the_pairs_of_another_trainer(make_trainer):
    (given,) = alignment(of_transformers)
    trainer = make_trainer([given])
    trainer.train()
    clone = copy.deepcopy(given)
    other = make_trainer([clone])
    other.eval_dataset = text_examples(16, start=500)
    other.train()
    keys = [key for key in trainer.state.log_history[1] if key.startswith("effective_rank")]
    assert keys
    by_clone, by_given = (t.state.log_history[1] for t in (other, trainer))
    assert all(by_clone[key] != by_given[key] for key in keys)


def test_a_copy_holds_no_model_of_a_run():
    class Large(torch.nn.Module):
        def __reduce__(self) -> Any:
            raise AssertionError("The model was copied.")

    callback = of_transformers.MatrixEntropyCallback()
    model = Large()
    model.layers = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
    callback._run.watch(model)
    pickle.dumps(callback)


def test_attributes_that_a_subclass_adds_are_copied(make_trainer: Callable[..., Any]):
    callback = Named("mine", 3)
    make_trainer([callback]).train()
    clone = through_pickle(callback)
    assert clone.name == "mine"
    trainer = make_trainer([clone])
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "matrix_entropy/last" in r] == [3, 6]


class Named(of_transformers.MatrixEntropyCallback):
    def __init__(self, name: str, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.name = name
