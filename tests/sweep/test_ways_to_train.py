"""Every way to train, in both frameworks: the readings are right, training is the same, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import collate, text_examples
from tests.sweep.runs import (
    EVERY,
    FRAMEWORKS,
    MONITORED,
    STEPS,
    Way,
    assert_right,
    assert_same,
    make_callback,
    train,
)

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
    watched, alone = (
        train(framework, way, tmp_path_factory.mktemp("run"), given) for given in ([make_callback(framework)], [])
    )
    return way, watched, alone


def test_readings_are_right(runs):
    way, watched, _ = runs
    assert_right(way, watched, steps=MONITORED, evaluations=[STEPS // 2, STEPS] if way.evaluate else [])
    of_step = [forward for forward in watched.forwards if forward.training and forward.step == EVERY]
    assert len(of_step) == way.accumulate


def test_training_is_bitwise_the_same_and_nothing_is_left_after_any_batch(runs):
    way, watched, alone = runs
    assert len(watched.losses) == STEPS * way.accumulate
    assert len(watched.left) > len(watched.losses)
    assert_same(watched, alone)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "way",
    [Way(lora=True, resume=True), Way(bf16=True, compiled="whole", evaluate=True)],
    ids=["lora, resumed", "bf16, compiled"],
)
def test_comparing_tokens_with_those_of_the_start_changes_nothing(framework, way, tmp_path):
    metrics = ("drift", "subspace_overlap", "token_cosine")
    callback = FRAMEWORKS[framework][1](
        EVERY, "all", metrics=metrics, probe=collate(text_examples(8, start=40)), reference="start", on_error="raise"
    )
    watched, alone = (train(framework, way, tmp_path / str(len(given)), given) for given in ([callback], []))
    assert_same(watched, alone)
    assert callback._run.state_dict()["reference_tokens"][""]["layers"].keys() == {"layer_00", "layer_01", "last"}
