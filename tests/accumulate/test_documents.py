"""LiDAR with documents as classes and their parts as views, against the paper's definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks._timing import peak_bytes
from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate import pieces
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from tests.conftest import collate, llama, text_examples
from tests.ranks import run_on_ranks
from tests.slow import Batch, slow_lidar

WIDTH = 12


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 40 tokens of WIDTH float64 numbers."""
    monkeypatch.setattr(pieces, "_PIECE", 40 * WIDTH * 8)


def batch(size: int, length: int, *, seed: int = 0, spoilt: bool = False, offset: float = 0.0) -> Batch:
    """Documents of unlike lengths, some too short, each with a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.01, 2, WIDTH)
    states = offset + torch.randn(size, length, WIDTH, generator=generator)
    states += spread * torch.randn(size, 1, WIDTH, generator=generator)
    mask = torch.rand(size, length, generator=generator) < 0.8
    mask[0, 5:] = False
    if spoilt:
        states[-1, 3, 2], mask[-1, 3] = torch.nan, True
    return states, mask


def monitored(*batches: Batch, **options: Any) -> dict[str, float]:
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics="lidar", **options)
    for states, mask in batches:
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
    return monitor.compute()


BATCHES = {
    "fewer documents than features": [batch(5, 20), batch(4, 31, seed=1)],
    "more": [batch(30, 12), batch(9, 21, seed=1), batch(1, 9, seed=2), batch(3, 100, seed=3)],
    "with NaN": [batch(20, 30, spoilt=True)],
    "far from the origin": [batch(20, 30, offset=1000.0), batch(9, 40, seed=1, offset=1000.0)],
}


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_that_of_the_definition(kind, dtype):
    found = monitored(*BATCHES[kind], dtype=dtype)
    assert found.pop("nonfinite_tokens/0", 0) == (kind == "with NaN")
    assert found == {"lidar/0": pytest.approx(slow_lidar(BATCHES[kind]), rel=1e-6)}


def test_it_is_the_number_of_directions_in_which_documents_differ():
    noise = torch.randn(400, 80, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centres = torch.zeros(400, 1, WIDTH, dtype=torch.float64)
    centres[torch.arange(400), 0, torch.arange(400) % 3] = 30.0
    # Three corners of a triangle span a plane.
    assert monitored((noise + centres, torch.ones(400, 80)))["lidar/0"] == pytest.approx(2, rel=0.01)
    assert monitored((noise, torch.ones(400, 80)))["lidar/0"] > 0.9 * WIDTH


def test_too_few_documents_have_none():
    with pytest.warns(UserWarning, match="Too few valid tokens or sequences were seen, so there is no reading of: 0"):
        assert math.isnan(monitored((torch.randn(1, 30, WIDTH), torch.ones(1, 30)))["lidar/0"])
    with pytest.warns(UserWarning, match="Too few valid tokens"):
        assert math.isnan(monitored((torch.randn(9, 7, WIDTH), torch.ones(9, 7)))["lidar/0"])


def on_rank(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, list[Batch]]]:
    """Three layers on two ranks, so that one rank owns the matrices of two; a third one sees nothing."""
    model = llama(dropout=0.0)
    monitor = EntropyMonitor(model, [0, 1, "last"], metrics=["lidar", "effective_rank"])
    seen: dict[str, list[Batch]] = {layer: [] for layer in monitor.layers}
    for start in range(1 + rank) if rank < world_size - 1 else []:
        own = collate(text_examples(14 + rank, start=40 * rank + 15 * start))
        with monitor:
            states = model(**own, output_hidden_states=True).hidden_states
        for layer, hidden in zip(monitor.layers, (states[0], states[1], states[-1]), strict=True):
            seen[layer].append((hidden.detach(), own["attention_mask"].bool()))
    return monitor.compute(), seen


def test_ranks_count_as_one():
    found = run_on_ranks(on_rank, 3)
    readings = [reading for reading, _ in found]
    assert readings[0] == readings[1] == readings[2]
    assert len(readings[0]) == 6
    for layer in found[0][1]:
        expected = slow_lidar([own for _, seen in found for own in seen[layer]])
        assert readings[0][f"lidar/{layer}"] == pytest.approx(expected, rel=1e-5)


def test_compute_later_gives_the_same():
    states, mask = batch(20, 30)
    model = nn.Sequential(nn.Identity(), nn.Identity())
    monitor = EntropyMonitor(model, ["0", "1"], metrics=["lidar", "matrix_entropy"])
    finish = None
    for _ in range(2):
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
        finish = finish or monitor.compute_later()
    assert finish() == monitor.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_state_and_the_work_space_however_many_come(dtype, monkeypatch):
    work_space, d = 2**21, 128
    monkeypatch.setattr(pieces, "_PIECE", work_space // 4)
    for shape in ((1, 2**15), (2**3, 2**12), (2**11, 2**4), (2**15, 1)):
        states: Tensor = torch.randn(*shape, d).to(dtype)
        mask = torch.rand(shape) < 0.8
        own = LayerAccumulator(
            frozenset({"between_documents", "within_documents"}),
            max_tokens=None,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        peak = peak_bytes(lambda own=own, states=states, mask=mask: own.update(states, mask))
        assert peak <= work_space + 2 * 8 * d * (d + 1) + 80 * 2**15, shape
