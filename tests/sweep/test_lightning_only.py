"""What only Lightning's callback depends on: a mask made by the user's function, and loggers it writes to itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from tests.sweep.runs import MONITORED, STEPS, Way, assert_right, assert_same, make_callback, train


@pytest.mark.filterwarnings("default:Monitoring failed")
def test_a_mask_that_cannot_be_made(tmp_path):
    way = Way(evaluate=True)

    def mask(batch: Any) -> Any:
        return batch["mask"]

    with pytest.warns(UserWarning, match="Monitoring failed: KeyError: 'mask' Training goes on"):
        watched = train("Lightning", way, tmp_path / "watched", [make_callback("Lightning", mask=mask)])
    read = [value for values in watched.readings.values() for value in values.values()]
    assert read
    assert all(map(math.isnan, read))
    assert_same(watched, train("Lightning", way, tmp_path / "alone", []))


def test_a_logger_that_cannot_be_reached_for_a_while(tmp_path, monkeypatch):
    # Lightning itself logs nothing then, so without the callback nobody would notice.
    log_metrics, calls = CSVLogger.log_metrics, []

    def unreachable_at_first(self: Any, metrics: Any, step: int | None = None) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise ConnectionError("no route to host")
        log_metrics(self, metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", unreachable_at_first)
    with pytest.warns(UserWarning, match="CSVLogger did not take the readings: no route to host. Training goes on"):
        watched = train("Lightning", Way(), tmp_path / "watched", [make_callback("Lightning")])
    assert len(watched.losses) == STEPS
    assert_right(Way(), watched, steps=MONITORED[1:])
    assert_same(watched, train("Lightning", Way(), tmp_path / "alone", []))
