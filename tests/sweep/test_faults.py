"""Whatever goes wrong during monitored training: it does what it does without the callback, and goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matent_callbacks.capture.events
import matent_callbacks.capture.hooks
import matent_callbacks.monitor.entropy_monitor
from matent_callbacks.monitor.recording import Recording
from tests.sweep.runs import FRAMEWORKS, MONITORED, STEPS, Record, Way, assert_right, assert_same, make_callback, train

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Callable[[str, Way], Record]:
    """The run without the callback, made once for all faults that do not change it."""

    @functools.cache
    def run(framework: str, way: Way) -> Record:
        return train(framework, way, tmp_path_factory.mktemp("alone"), [])

    return run


def poison_one_layer(model: Any) -> None:
    """NaN and Inf come out of the first block and are gone before the next one: only a reading sees them."""
    first, second = model.model.layers
    first = first.mlp  # inside what checkpointing computes again
    of_first, of_second = first.forward, second.forward

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        states = of_first(*args, **kwargs).clone()
        states[0, 2], states[1, 3] = float("nan"), float("inf")
        return states

    first.forward = poisoned
    second.forward = lambda states, **kwargs: of_second(torch.nan_to_num(states, 0.0, 0.0, 0.0), **kwargs)


@BOTH
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_nan_in_one_layer_is_counted_once_and_left_out(framework, reentrant, tmp_path, alone):
    # With checkpointing, what is computed again must not count again; entropies would not tell.
    way = Way(spoil=poison_one_layer, reentrant=reentrant)
    watched = train(framework, way, tmp_path, [make_callback(framework, ["all", "*layers.0.mlp"])])
    assert_same(watched, alone(framework, way))
    for values in watched.readings.values():
        counted = {key.split(".")[-1]: values.pop(key) for key in list(values) if key.startswith("nonfinite_tokens")}
        assert counted == {"nonfinite_tokens/layer_01": 2, "mlp": 2}
    assert_right(way, watched, steps=MONITORED)


class Odd(nn.Module):
    """Its output is no hidden states."""

    def forward(self, states: Tensor) -> Tensor:
        return states.sum()


def add_odd_layer(model: Any) -> None:
    model.odd = Odd()
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: (model.odd(states), head(states))[1]


@BOTH
@pytest.mark.filterwarnings("default:Reading layer")
def test_a_layer_of_unexpected_shape_is_left_out_with_one_warning(framework, tmp_path, alone):
    way = Way(spoil=add_odd_layer)
    with pytest.warns(UserWarning, match=r"Reading layer '.*odd' failed") as caught:
        watched = train(framework, way, tmp_path, [make_callback(framework, ["all", "*odd"])])
    assert len([w for w in caught if "odd' failed" in str(w.message)]) == 1
    assert_same(watched, alone(framework, way))
    assert_right(way, watched, steps=MONITORED)


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


@BOTH
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (matent_callbacks.capture.forward, "find_packing"),
        (matent_callbacks.capture.events, "first_tensor"),
        (matent_callbacks.capture.events, "in_backward"),
        (matent_callbacks.capture.hooks, "compiled_entrance"),
        (matent_callbacks.monitor.entropy_monitor, "PendingReadings"),
        (Recording, "record"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("default:Reading layer", "default:Monitoring failed")
def test_an_exception_anywhere_in_monitoring_is_told_and_training_goes_on(
    framework, owner, name, tmp_path, alone, monkeypatch
):
    way = Way(evaluate=True)
    given = make_callback(framework)
    monkeypatch.setattr(owner, name, fails)
    with pytest.warns(UserWarning, match="boom") as caught:
        watched = train(framework, way, tmp_path, [given])
    assert len({str(w.message) for w in caught if "boom" in str(w.message)}) <= 3  # once a layer
    assert len(watched.losses) == STEPS
    assert_same(watched, alone(framework, way))
    assert not watched.readings
    assert not watched.evaluations
