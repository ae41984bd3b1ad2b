"""Training that is cut short, by its data or by Ctrl-C: as without the callback, and right when it starts again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import text_examples
from tests.sweep.runs import (
    BATCH,
    FRAMEWORKS,
    MONITORED,
    STEPS,
    TOKENS,
    Record,
    Way,
    assert_right,
    assert_same,
    make_callback,
    train,
)

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)


class EndsEarly(torch.utils.data.IterableDataset):
    """4 batches and a half of 4."""

    def __iter__(self) -> Iterator[Any]:
        return iter(text_examples(4 * BATCH + 2, TOKENS))


class PromisesMore(EndsEarly):
    def __len__(self) -> int:
        return 100


@BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dataset", [EndsEarly(), PromisesMore()], ids=["unknown length", "wrong length"])
def test_a_loader_that_ends_early(framework, accumulate, dataset, tmp_path):
    way = Way(accumulate=accumulate)
    watched = train(framework, way, tmp_path / "watched", [make_callback(framework)], dataset=dataset)
    alone = train(framework, way, tmp_path / "alone", [], dataset=dataset)
    assert_same(watched, alone)
    # The Trainer believes a length and ends with the data.
    ends = framework == "Trainer" and isinstance(dataset, PromisesMore)
    assert watched.steps == (5 // accumulate if ends else STEPS)
    assert_right(way, watched, steps=[step for step in MONITORED if step <= watched.steps])


class StepError(Exception):
    pass


def fail_by_exception() -> None:
    raise StepError


def fail_by_interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def own_sigint() -> Iterator[None]:
    """SIGINT interrupts, whatever the tests were started with (nohup ignores it), and however Lightning leaves it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@BOTH
@pytest.mark.parametrize("fail", [fail_by_exception, fail_by_interrupt])
def test_interrupted_in_the_middle_of_a_monitored_step_and_started_again(framework, fail, tmp_path, own_sigint):
    way = Way(accumulate=2)

    def run(callbacks: list[Any], folder: Path) -> tuple[type, Record, Record]:
        record = Record(way.trained_model())
        # The second micro-batch of step 2, after the first block.
        calls = []

        def break_off(module: nn.Module, args: Any) -> None:
            calls.append(1)
            if len(calls) == 4:
                fail()

        handle = record.model.model.layers[1].register_forward_pre_hook(break_off)
        with pytest.raises((KeyboardInterrupt, SystemExit, StepError)) as caught:
            train(framework, way, folder / "first", callbacks, record)
        handle.remove()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        again = Record(record.model, module=record.module)
        train(framework, way, folder / "again", callbacks, again)
        return caught.type, record, again

    kind, watched, again = run([make_callback(framework)], tmp_path / "watched")
    kind_alone, alone, again_alone = run([], tmp_path / "alone")
    assert kind is kind_alone
    assert len(watched.losses) == 3
    assert_same(watched, alone)
    assert not watched.readings
    assert_same(again, again_alone)
    assert_right(way, again, steps=MONITORED)
