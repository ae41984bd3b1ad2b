"""Every way to train, in both frameworks: the readings are right, training is the same, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sweep.runs import EVERY, FRAMEWORKS, METRICS, STEPS, Way, expected, train

WAYS = {
    "plain": Way(),
    "accumulation": Way(accumulate=4),
    "checkpointing, reentrant": Way(reentrant=True),
    "checkpointing, not reentrant": Way(reentrant=False),
    "compiled": Way(compiled="whole", evaluate=True),
    "compiled in place": Way(compiled="in place"),
    "compiled blocks": Way(compiled="blocks"),
    "bf16": Way(bf16=True, evaluate=True),
    "lora": Way(lora=True),
    "packed": Way(packed=True),
    "evaluation": Way(evaluate=True),
    "resumed": Way(resume=True),
    "packed, accumulation, bf16": Way(packed=True, accumulate=2, bf16=True),
}


@pytest.fixture(scope="module", params=[(f, w) for f in FRAMEWORKS for w in WAYS], ids=" ".join)
def runs(request: Any, tmp_path_factory: Any) -> Any:
    """One cell of the table: the way, its run with the callback, and its run without."""
    framework, name = request.param
    way = WAYS[name]
    callback = FRAMEWORKS[framework][1](EVERY, "all", metrics=METRICS)
    watched, alone = (train(framework, way, tmp_path_factory.mktemp("run"), given) for given in ([callback], []))
    return way, watched, alone


def test_readings_are_right(runs):
    # Of the same forward bit for bit: what is left is float32 statistics against float64.
    way, watched, _ = runs
    assert sorted(watched.readings) == list(range(EVERY, STEPS + 1, EVERY))
    assert sorted(watched.evaluations) == ([STEPS // 2, STEPS] if way.evaluate else [])
    for training, readings in ((True, watched.readings), (False, watched.evaluations)):
        for step, values in readings.items():
            forwards = [f for f in watched.forwards if f.training == training and f.step == step]
            assert len(forwards) == (way.accumulate if training else 3)
            assert values == pytest.approx(expected(way, forwards), rel=1e-5)


def test_training_is_bitwise_the_same(runs):
    way, watched, alone = runs
    assert len(watched.losses) == STEPS * way.accumulate
    assert watched.losses == alone.losses
    weights, expected_weights = watched.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    assert torch.equal(watched.random, alone.random)


def test_nothing_is_left_after_any_batch(runs):
    _, watched, alone = runs
    assert len(watched.left) >= STEPS
    assert watched.left == alone.left
