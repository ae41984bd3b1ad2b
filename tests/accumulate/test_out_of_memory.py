"""What is left when memory runs out in the middle of a reading: nothing that the reading held."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor, MatrixEntropy
from matent_callbacks.accumulate import moments, pieces, pooled_tokens, sequences
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.symmetric import add_second_moment
from matent_callbacks.monitor import decomposition, solvers
from matent_callbacks.monitor.readings import PendingReadings

WIDTH = 64
METRICS = ("matrix_entropy", "rankme", "sequence_matrix_entropy")


@pytest.fixture
def failing(monkeypatch) -> list[int]:
    """Counts the pieces that are added to a scatter, and lets memory run out at the fourth."""
    monkeypatch.setattr(pieces, "_PIECE", 32 * WIDTH * 4)
    calls: list[int] = []

    def add(packed: Tensor, z: Tensor) -> None:
        calls.append(len(z))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory left")
        add_second_moment(packed, z)

    for module in (moments, pieces):
        monkeypatch.setattr(module, "add_second_moment", add)
    return calls


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which would find what holds itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def large_tensors() -> int:
    """Tensors that are as large as a piece or a scatter."""
    return sum(1 for item in gc.get_objects() if type(item) is Tensor and item.numel() >= 32 * WIDTH)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("shape", [(1, 500), (50, 10)])
def test_a_layer_frees_what_it_holds_warns_once_and_is_left_out(failing, shape):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    monitor = EntropyMonitor(model, "*", metrics=METRICS, on_error="warn")
    states = torch.randn(*shape, WIDTH)
    other = torch.randn(2, WIDTH + 3, WIDTH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = large_tensors()
        with monitor:
            model[0](states)
        assert len(failing) == 4
        assert large_tensors() == before
        with monitor:
            model(other)
        values = monitor.compute()
    assert [str(warning.message).split(":")[0] for warning in caught] == ["Reading layer '0' failed"]
    assert set(values) == {f"{name}/1" for name in METRICS}


@pytest.mark.usefixtures("no_collection")
def test_a_metric_starts_afresh(failing):
    metric, twin = MatrixEntropy(center="global"), MatrixEntropy(center="global")
    first, second = torch.randn(1, 40, WIDTH), torch.randn(1, 60, WIDTH)
    metric.update(first)
    before = large_tensors() - 1  # its scatter
    with pytest.raises(torch.OutOfMemoryError):
        metric.update(torch.randn(1, 200, WIDTH))
    assert len(failing) == 4
    assert large_tensors() == before
    metric.update(second)
    twin.update(second)
    assert torch.equal(metric.compute(), twin.compute())


@pytest.mark.usefixtures("no_collection")
def test_nothing_of_sequences_stays(monkeypatch):
    def fails(matrix: Tensor, **arguments) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(sequences, "entropy_of_matrix", fails)
    accumulator = LayerAccumulator(
        frozenset({"pooled", "sequence"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
    )
    states = torch.randn(4, 40, WIDTH)
    before = large_tensors()
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.update(states, None)
    assert large_tensors() == before


@pytest.mark.usefixtures("no_collection")
def test_nothing_stays_if_the_scatter_cannot_be_allocated(monkeypatch):
    def fails(*args, **arguments) -> None:
        raise torch.OutOfMemoryError("no memory left")

    accumulator = LayerAccumulator(
        frozenset({"pooled"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
    )
    before = large_tensors()
    for _ in range(2):
        accumulator.update(torch.randn(1, 32, WIDTH), None)
    assert large_tensors() == before + 2  # tokens that are kept
    monkeypatch.setattr(pooled_tokens, "add_to_scatter", fails)
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.update(torch.randn(1, 32, WIDTH), None)
    assert large_tensors() == before
    assert accumulator.tokens["pooled"].matrix().moments.num_tokens == 0


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("where", ["here", "side by side", "in the background"])
def test_a_decomposition_that_fails_leaves_nothing(monkeypatch, where):
    on_main_thread = set[bool]()

    def fails(matrix: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        on_main_thread.add(threading.current_thread() is threading.main_thread())
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(decomposition, "solved", fails)
    if where == "side by side":
        if solvers._native() is None:
            pytest.skip("here every matrix has all threads")
        monkeypatch.setattr(decomposition, "_WORTH_A_THREAD", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    before = large_tensors()

    def read(executor: ThreadPoolExecutor | None) -> None:
        accumulators = {}
        for layer in "abcd":
            accumulators[layer] = LayerAccumulator(
                frozenset({"pooled"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
            )
            accumulators[layer].update(torch.randn(3, 40, WIDTH), None)
        pending = PendingReadings(accumulators, ("matrix_entropy",), executor=executor)
        del accumulators
        pending.result()

    with ThreadPoolExecutor(1) as executor, pytest.raises(torch.OutOfMemoryError):
        read(executor if where == "in the background" else None)
    assert large_tensors() == before
    assert on_main_thread == {"here": {True}, "side by side": {True, False}, "in the background": {False}}[where]


LIMITED = """
import resource, warnings
from pathlib import Path
import torch
from torch import nn
from matent_callbacks import EntropyMonitor

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
monitor = EntropyMonitor(model, "*", metrics=("matrix_entropy", "rankme", "sequence_matrix_entropy"), on_error="warn")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
hidden = torch.randn(2**15, 256)

def step(states):
    optimizer.zero_grad()
    with monitor:
        loss = model(states).square().mean()
    loss.backward()
    optimizer.step()
    return monitor.compute()

def limit(*_):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22, hard))

_, hard = resource.getrlimit(resource.RLIMIT_AS)
step(hidden[:512])
# From the output of the first layer, which is there already, until the second one begins.
hooks = [
    model[0].register_forward_hook(limit),
    model[1].register_forward_pre_hook(lambda *_: resource.setrlimit(resource.RLIMIT_AS, (hard, hard))),
]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step(hidden)
    for hook in hooks:
        hook.remove()
    values = step(hidden)
    print(*(key for key, value in values.items() if value == value))
    print(*(key for key, value in values.items() if value != value))
for warning in caught:
    print(warning.message)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_memory_that_really_runs_out_ends_no_training():
    found = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    values, undefined, message = found.stdout.splitlines()[:3]
    assert values.split() == [f"{name}/1" for name in METRICS]
    assert undefined.split() == [f"{name}/0" for name in METRICS]  # known from the reading before
    assert message.startswith("Reading layer '0' failed: ")
    assert "memory" in message
    assert found.stdout.count("training goes on") == 1
