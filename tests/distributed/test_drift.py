"""What has moved since the reference, over two ranks: the tokens of both are one set, whoever has them."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from matent_callbacks.accumulate.probe_tokens import ProbeTokens
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.monitor.comparison import Comparison
from tests.callbacks.test_drift import METRICS, changed, drift_monitor
from tests.conftest import collate, llama, text_examples
from tests.ranks import run_on_ranks

A, B, C = (collate(text_examples(2 + i, start=4 * i)) for i in range(3))
# The batches of each rank.
SHARES: dict[str, tuple[list[Any], list[Any]]] = {
    "shares": ([A, B], [C]),
    "the same": ([A, B, C], [A, B, C]),
    "overlapping": ([A, B], [B, C]),
    "all on one": ([], [A, B, C]),
}
MOST = 70


def start() -> Any:
    return llama(layers=2, dropout=0.0)


def run(probe: Any, folder: Path | None = None, *, state: Any = None, **arguments: Any) -> tuple[dict[str, float], Any]:
    """What is logged after a change, and the state."""
    monitor, model = drift_monitor(**{"probe": probe, "drift_tokens": MOST} | arguments), start()
    if state is not None:
        monitor.load_state_dict(state)
        changed(model)
    monitor.watch(model)
    monitor.run_begins(model, step=0 if state is None else 2, directory=folder)
    monitor.save_reference()
    if state is None:
        changed(model)
    held = [layer for own in monitor._measurement._drift.comparisons.values() for layer in own.reference]
    returned = monitor.step_ends(model, 4, at=4) or monitor.late_values()
    return returned[4], {**monitor.state_dict(), "held": held}


def on_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: run(shares[rank], folder) for name, shares in SHARES.items()}
    state = {key: value for key, value in found["shares"][1].items() if key != "held"}
    found["resumed"] = run([C, A] if rank else [B], folder, state=state)
    found["background"] = run(SHARES["shares"][rank], background=True)
    monitor, model = drift_monitor(probe=SHARES["shares"][rank]), start()
    monitor._measurement._guard = Guard("test", "warn")
    monitor.watch(model)
    monitor.run_begins(model)
    if rank:
        model.model.layers[1].forward = broken
    changed(model)
    found["broken"] = monitor.step_ends(model, 2, at=2)[2], None
    for name, failing in {"room": (Comparison, "room", broken), "rows": (ProbeTokens, "add", misplaced)}.items():
        found[name] = failing_here(failing if rank else None, SHARES["shares"][rank])
    return found


def on_part(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Each rank holds a part of the same sequences; then the same sequences as a whole."""
    whole = [torch.randn(3, length, 8, generator=torch.Generator().manual_seed(length)) for length in (13, 40)]
    parts = [batch[:, :9] if rank == 0 else batch[:, 9:] for batch in whole]
    together = tokenwise(parts, context_group=dist.group.WORLD)
    first = dist.new_group([0])
    alone = tokenwise(whole, process_group=first) if rank == 0 else {}
    return together, alone


def tokenwise(probe: list[torch.Tensor], **groups: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    monitor = drift_monitor(probe=probe, layers="*", **groups)  # of all tokens: evenly spaced ones would be others
    monitor.watch(model)
    monitor.run_begins(model)
    changed(model)
    return monitor.step_ends(model, 2, at=2)[2]


add = ProbeTokens.add


def misplaced(tokens: Any, *args: Any, **kwargs: Any) -> None:
    """Keep rows that do not fit when they are put together."""
    add(tokens, *args, **kwargs)
    tokens._kept = [(rows + 10**6, *others) for rows, *others in tokens._kept]


def failing_here(failing: Any, probe: Any) -> tuple[list[dict[str, float]], list[str]]:
    """What is logged at a step where this rank fails between two exchanges, and at the next; and the warnings."""
    monitor, model = drift_monitor(probe=probe, drift_tokens=MOST), start()
    monitor._measurement._guard = Guard("test", "warn")
    monitor.watch(model)
    monitor.run_begins(model)
    changed(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mock.patch.object(*failing) if failing else nullcontext():
            first = monitor.step_ends(model, 2, at=2)[2]
    return [first, monitor.step_ends(model, 4, at=4)[4]], [str(warning.message) for warning in caught]


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, 2, folder)


@pytest.mark.parametrize("name", [*SHARES, "resumed", "background"])
def test_the_tokens_of_both_ranks_are_one_set(results, name):
    expected, _ = run([A, B, C])
    for result in results:
        values, state = result[name]
        assert {key: value for key, value in values.items() if key.startswith(METRICS)} == pytest.approx(
            {key: value for key, value in expected.items() if key.startswith(METRICS)}, abs=1e-9
        )
        assert values == results[0][name][0]
        # Each layer is held by one rank.
        assert 0 < len(state["held"]) < 3


def test_another_number_of_ranks_finds_the_reference(results, folder):
    _, state = results[0]["shares"]
    values, _ = run([B, C, A], folder, state=state)
    expected, _ = run([A, B, C])
    assert {k: v for k, v in values.items() if k.startswith(METRICS)} == pytest.approx(
        {k: v for k, v in expected.items() if k.startswith(METRICS)}, abs=1e-9
    )


def test_a_rank_that_fails_keeps_nobody_waiting_and_its_tokens_are_left_out(results):
    values = [result["broken"][0] for result in results]
    assert values[0] == values[1]
    alone, _ = run([A, B], drift_tokens=2048)
    assert {k: v for k, v in values[0].items() if k.startswith(METRICS)} == pytest.approx(
        {k: v for k, v in alone.items() if k.startswith(METRICS)}, abs=1e-9
    )


@pytest.mark.parametrize("name", ["room", "rows"])
def test_a_rank_that_fails_between_two_exchanges_keeps_nobody_waiting(results, name):
    expected, _ = run([A, B, C])
    for values, caught in (result[name] for result in results):
        failed, after = values
        assert all(math.isnan(value) for value in failed.values())
        assert any("failed on 1 rank" in message for message in caught)
        assert after["drift/last"] == pytest.approx(expected["drift/last"], abs=1e-9)


def test_parts_of_sequences_are_compared_as_the_whole():
    found = run_on_ranks(on_part, 2)
    alone = found[0][1]
    assert {name.partition("/")[0] for name in alone} >= set(METRICS)
    for together, _ in found:
        assert together == pytest.approx(alone, abs=1e-5)
