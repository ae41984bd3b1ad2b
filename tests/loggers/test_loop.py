"""What reaches the runs that a loop of one's own logs with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from matent_callbacks import LoopMonitor
from tests.conftest import collate, llama, text_examples
from tests.loggers.libraries import PICTURES, SwanLab, Trackio


def run_a_loop(log: Any) -> None:
    model = llama(dropout=0.0)
    with LoopMonitor(model, 2, "all", log=log, on_error="raise") as monitor:
        for step in range(1, 7):
            with monitor.step(step):
                model(**collate(text_examples(3, start=step)))


@pytest.mark.parametrize("kind", [Trackio, SwanLab])
def test_numbers_and_pictures_are_stored_under_their_steps(kind, prepare, drawn):
    logged = {}
    run_a_loop(lambda values, step: logged.update({step: values}))
    assert not drawn
    library = prepare(kind)
    run_a_loop(library.start_run())
    library.finish()
    stored = library.stored()

    assert sorted(logged) == [2, 4, 6]
    for key in logged[2]:
        assert stored.numbers[key] == {step: pytest.approx(values[key]) for step, values in logged.items()}
    assert sorted(stored.pictures) == PICTURES
    for name in PICTURES:
        assert list(stored.pictures[name]) == [4, 6]
        for seen, pictures in zip(stored.pictures[name].values(), drawn, strict=True):
            np.testing.assert_array_equal(seen, pictures[name])
