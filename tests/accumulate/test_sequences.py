"""Holevo information and curvature: what tells sequences apart, and how sharply each turns."""

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
from matent_callbacks.functional import curvature
from tests.conftest import collate, llama, text_examples
from tests.ranks import run_on_ranks
from tests.slow import Batch, sequence_readings

WIDTH = 12
METRICS = ("holevo_information", "curvature")


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 10 tokens of WIDTH float32 numbers."""
    monkeypatch.setattr(pieces, "_PIECE", 10 * WIDTH * 4)


def batch(size: int, length: int, *, seed: int = 0, holes: bool = False, offset: float = 0.0) -> Batch:
    """Walks: sequences of unlike lengths and scales, padded on either side."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(size, 1, WIDTH, generator=generator)
    states = offset + (spread * torch.randn(size, length, WIDTH, generator=generator)).cumsum(1)
    place, mask = torch.arange(length), torch.ones(size, length, dtype=torch.bool)
    for row in range(size):
        begin, end = sorted(torch.randint(0, length + 1, (2,), generator=generator).tolist())
        mask[row] = (place >= begin) & (place < max(end, min(begin + 3, length)))
    if holes:
        mask &= torch.rand(size, length, generator=generator) < 0.8
        states[0, mask[0].nonzero()[:1, 0], 2] = torch.nan
    return states, mask


def monitored(*batches: Batch, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, float]:
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics=METRICS, dtype=dtype, **options)
    for states, mask in batches:
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
    return {name.removesuffix("/0"): value for name, value in monitor.compute().items()}


BATCHES = {
    "short": [batch(7, 5), batch(3, 8, seed=1), batch(9, 4, seed=2)],
    "long": [batch(3, 37), batch(1, 60, seed=1), batch(2, 11, seed=2)],
    "with holes and NaN": [batch(5, 9, holes=True), batch(4, 33, seed=1, holes=True)],
}


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("kind", BATCHES)
def test_readings_are_those_of_the_definition(kind):
    found = monitored(*BATCHES[kind])
    assert found.pop("nonfinite_tokens", 0) == 2 * (kind == "with holes and NaN")
    assert found == pytest.approx(sequence_readings(BATCHES[kind]), rel=1e-9)


def test_float32_stands_a_mean_that_dwarfs_the_spread():
    for offset, rel in ((0.0, 1e-5), (1000.0, 1e-4)):
        batches = [batch(20, 30, seed=seed, offset=offset) for seed in range(3)]
        assert monitored(*batches, dtype=torch.float32) == pytest.approx(sequence_readings(batches), rel=rel)


def test_holevo_information_lies_between_nothing_and_the_number_of_sequences():
    tokens, mask = torch.randn(6, 20, 2, dtype=torch.float64), torch.ones(6, 20, dtype=torch.bool)
    # In a plane of their own each, and all in the same.
    apart = torch.zeros(6, 20, WIDTH, dtype=torch.float64)
    for row in range(6):
        apart[row, :, 2 * row : 2 * row + 2] = tokens[row]
    assert monitored((apart, mask))["holevo_information"] == pytest.approx(math.log(6), rel=1e-12)
    same = apart[:1].expand(6, -1, -1)
    for dtype in (torch.float32, torch.float64):
        assert 0 <= monitored((same, mask), dtype=dtype)["holevo_information"] < 1e-5
    # Tokens without a direction have no part in any covariance: two that are alike, and one alone.
    flat, alone = torch.ones(1, 20, WIDTH), torch.arange(20)[None] < 1
    for extra in ((flat, mask[:1]), (apart[:1], alone)):
        assert monitored((apart, mask), extra)["holevo_information"] == pytest.approx(math.log(6), rel=1e-12)


def test_curvature_is_exact_for_angles_near_a_straight_line_and_a_return():
    def path(*angles: float) -> Tensor:
        headings = torch.tensor([0.0, *angles], dtype=torch.float64).cumsum(0)
        steps = torch.stack([headings.cos(), headings.sin()], 1)
        return torch.cat([steps.new_zeros(1, 2), steps.cumsum(0)])

    for angle in (0.0, 1e-9, 1e-5, 0.3, math.pi / 2, math.pi - 1e-7, math.pi):
        assert curvature(path(angle, angle)).item() == pytest.approx(angle, rel=1e-6, abs=1e-15)
    assert curvature(path(0.01, 0.03).float()).item() == pytest.approx(0.02, rel=1e-4)


def test_curvature_leaves_out_what_has_no_angle():
    states = torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 1], [2, 1]])
    assert curvature(states).item() == pytest.approx(math.pi / 2)  # the steps of length zero touch three tokens
    assert curvature(states[:3]).isnan()
    assert curvature(torch.randn(2, 2, 4)).isnan().all()
    assert curvature(torch.zeros(1, 0, 4)).isnan().all()
    with_padding = torch.cat([torch.full((2, 2), 9.0), states, torch.full((3, 2), torch.nan)])
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    assert curvature(with_padding, mask) == curvature(states)
    with pytest.raises(TypeError, match=r"`hidden_states` must be a floating point tensor, got torch.int64"):
        curvature(torch.ones(3, 4, dtype=torch.int64))


def test_documents_of_a_packed_batch_are_sequences_of_their_own():
    model = llama(dropout=0.0)
    lengths = (5, 9, 2, 7)
    ids = torch.randint(2, 100, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    monitor = EntropyMonitor(model, metrics=METRICS, dtype=torch.float64)
    with monitor:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        hidden = model(input_ids=ids, position_ids=positions, output_hidden_states=True).hidden_states[-1].detach()
    documents = [(part[None], torch.ones(1, len(part), dtype=torch.bool)) for part in hidden[0].split(lengths)]
    assert monitor.compute() == {
        f"{n}/last": pytest.approx(v, rel=1e-8) for n, v in sequence_readings(documents).items()
    }


def on_rank(rank: int, world_size: int) -> tuple[dict[str, float], list[Batch]]:
    """Sequences of unlike number and length on each rank; the last rank has none."""
    model = llama(dropout=0.0)
    monitor = EntropyMonitor(model, metrics=METRICS, dtype=torch.float64)
    seen: list[Batch] = []
    for start in range(1 + rank) if rank < world_size - 1 else []:
        own = collate(text_examples(4 + rank, start=20 * rank + 8 * start))
        with monitor:
            hidden = model(**own, output_hidden_states=True).hidden_states[-1]
        seen.append((hidden.detach(), own["attention_mask"].bool()))
    return monitor.compute(), seen


def test_ranks_count_as_one():
    found = run_on_ranks(on_rank, 3)
    readings = [reading for reading, _ in found]
    assert readings[0] == readings[1] == readings[2]
    expected = sequence_readings([own for _, seen in found for own in seen])
    assert readings[0] == {f"{name}/last": pytest.approx(value, rel=1e-8) for name, value in expected.items()}


def test_a_mean_has_no_estimate():
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics="curvature", solver="approximate")
    monitor.read(torch.randn(2, 5, WIDTH))
    assert set(monitor.compute()) == {"curvature/0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_curvature_takes_the_work_space_however_many_tokens_come(dtype, monkeypatch):
    work_space, d = 2**21, 128
    monkeypatch.setattr(pieces, "_PIECE", work_space // 4)
    for shape in ((1, 2**15), (2**3, 2**12), (2**10, 2**5)):
        states = torch.randn(*shape, d).to(dtype)
        mask = torch.rand(shape) < 0.8
        own = LayerAccumulator(
            frozenset({"curvature"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
        )
        peak = peak_bytes(lambda own=own, states=states, mask=mask: own.update(states, mask))
        assert peak <= work_space + 80 * 2**15, shape
        assert peak > work_space / 4
