"""The state of watching a run, without any Trainer: what is measured when, and where it is to be logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matent_callbacks import EntropyMonitor
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.run_monitor import RunMonitor
from tests.conftest import collate, llama, text_examples


def batch(step: int) -> Any:
    return collate(text_examples(3, start=3 * step))


def run_monitor(every_n_steps: int = 2, **arguments: Any) -> RunMonitor:
    settings: dict[str, Any] = {
        "metrics": ("matrix_entropy",),
        "embedding": "mean",
        "on_error": "raise",
        "solver": "exact",
        "window_steps": 1,
        "pictures": False,
        "background": False,
        **dict.fromkeys(("probe", "mask", "name", "reference", "process_group", "context_group")),
    }
    layers = arguments.pop("layers", "last")
    return RunMonitor(Guard("test", "raise"), every_n_steps, layers, **(settings | arguments))


@pytest.fixture
def model() -> Any:
    return llama(layers=2, dropout=0.0)


def entropy_of(model: Any, *steps: int) -> float:
    monitor = EntropyMonitor(model, metrics="matrix_entropy")
    with monitor, torch.no_grad():
        for step in steps:
            model(**batch(step))
    return monitor.compute()["matrix_entropy/last"]


def run(monitor: RunMonitor, model: Any, steps: int, *, from_step: int = 0, micro_batches: int = 1) -> dict[Any, Any]:
    """What was returned at each step, of which there is one batch for every micro-batch."""
    monitor.watch(model)
    monitor.run_begins(model, step=from_step)
    returned = {}
    for step in range(from_step + 1, from_step + steps + 1):
        for i in range(micro_batches):
            monitor.batch_begins(model, step=step - 1)
            model(**batch(10 * i + step))
            monitor.batch_ends()
        returned[step] = monitor.step_ends(model, step, at=f"step {step}", last=step == from_step + steps)
    return returned


def test_steps_that_are_multiples_are_measured(model):
    returned = run(run_monitor(3), model, 7, from_step=1)
    assert [step for step, values in returned.items() if values is not None] == [3, 6]
    assert returned[3] == {"step 3": {"matrix_entropy/last": pytest.approx(entropy_of(model, 3), rel=1e-5)}}


def test_nothing_is_in_place_at_other_steps(model):
    monitor = run_monitor(3)
    monitor.watch(model)
    monitor.batch_begins(model, step=0)
    assert not any(module._forward_hooks for module in model.modules())
    monitor.batch_begins(model, step=2)
    assert any(module._forward_hooks for module in model.modules())
    monitor.batch_ends()
    assert not any(module._forward_hooks for module in model.modules())


def test_micro_batches_and_windows_are_one_measurement(model):
    returned = run(run_monitor(4, window_steps=2), model, 4, micro_batches=2)
    expected = entropy_of(model, 3, 13, 4, 14)
    assert returned[4] == {"step 4": {"matrix_entropy/last": pytest.approx(expected, rel=1e-5)}}


def test_a_step_that_was_broken_off_is_left_out(model):
    monitor = run_monitor(1)
    monitor.watch(model)
    monitor.batch_begins(model, step=0)
    model(**batch(5))
    monitor.batch_ends()
    monitor.discard_step()
    assert run(monitor, model, 1)[1]["step 1"]["matrix_entropy/last"] == pytest.approx(entropy_of(model, 1), rel=1e-5)


def test_values_from_the_background_belong_to_their_own_step(model):
    monitor = run_monitor(2, background=True)
    returned = run(monitor, model, 5)
    assert returned[2] == {}
    assert list(returned[4]) == ["step 2"]
    assert list(monitor.late_values()) == ["step 4"]
    assert monitor.late_values() == {}


def test_a_batch_that_makes_several_steps_is_due_once_it_has_passed_a_multiple(model):
    monitor = run_monitor(5)
    monitor.watch(model)
    due = []
    for step in range(3, 16, 3):
        monitor.batch_begins(model, step=step - 3, completes=None)
        model(**batch(step))
        monitor.batch_ends()
        due.append(monitor.step_ends(model, step, at=step) is not None)
    assert due == [False, True, False, True, True]


def test_probes_are_measured_at_the_end_too_but_not_twice(model):
    monitor = run_monitor(2, probe={"a": batch(1), "b": batch(2)}, reference="start")
    returned = run(monitor, model, 3)
    assert [step for step, values in returned.items() if values] == [2, 3]
    assert returned[2]["step 2"].keys() == {f"{p}/{m}/last" for p in "ab" for m in ("matrix_entropy", "diff_erank")}
    assert returned[2]["step 2"]["a/diff_erank/last"] == 0
    assert monitor.run_ends(model, at="end") == {}
    assert monitor.run_ends(model, at="end", replaced=True) == {"end": returned[3]["step 3"]}


def test_data_sets_of_an_evaluation_are_apart_and_the_window_of_training_goes_on(model):
    monitor = run_monitor(2, window_steps=2)
    monitor.watch(model)
    monitor.run_begins(model)
    for step in (1, 2):
        monitor.batch_begins(model, step=step - 1)
        model(**batch(step))
        monitor.batch_ends()
        values = monitor.step_ends(model, step, at=step)
        monitor.evaluation_begins()
        for data_set in (0, 1):
            monitor.evaluation_batch_begins(model, data_set=data_set)
            model(**batch(7 + data_set))
            monitor.batch_ends()
        for data_set in (0, 1):
            evaluated = monitor.evaluation_ends(model, data_set=data_set)["matrix_entropy/last"]
            assert evaluated == pytest.approx(entropy_of(model, 7 + data_set), rel=1e-5)
    assert values == {2: {"matrix_entropy/last": pytest.approx(entropy_of(model, 1, 2), rel=1e-5)}}


def test_state_and_what_a_renewed_one_has_not(model):
    monitor = run_monitor(2, probe=batch(1), reference="start", pictures=True)
    monitor.watch(model)
    monitor.run_begins(model)
    monitor.remember(2, {"matrix_entropy/last": 1.0, "other": 2.0})
    state = monitor.state_dict()
    assert state["records"] == [{"step": 2, "matrix_entropy/last": 1.0}]
    resumed = monitor.renewed(Guard("test", "raise"))
    assert resumed.state_dict()["reference_ranks"] is None
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(50.0)
    resumed.load_state_dict(state)
    resumed.watch(model)
    resumed.run_begins(model, step=2)
    assert resumed.state_dict() == state
    assert resumed.step_ends(model, 4, at=4)[4]["diff_erank/last"] != 0
