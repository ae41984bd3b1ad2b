"""One vector a sequence: the quantities of their covariance, against a slow version of each."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks._timing import peak_bytes
from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate import pieces
from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from tests.conftest import collate, llama, text_examples
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.ranks import run_on_ranks
from tests.slow import Batch, embedding_readings, slow_vectors

WIDTH = 12
METRICS = tuple(name for name, row in CATALOGUE.items() if row.source in ("embedding", "raw_embedding"))


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 10 tokens of WIDTH float32 numbers."""
    monkeypatch.setattr(pieces, "_PIECE", 10 * WIDTH * 4)


def batch(size: int, length: int, *, seed: int, offset: float = 0.0, spoilt: bool = False) -> Batch:
    """Sequences of unlike lengths: padded on the left, on the right, with holes, and one without any token."""
    generator = torch.Generator().manual_seed(seed)
    states = offset + torch.linspace(0.3, 2, WIDTH) * torch.randn(size, length, WIDTH, generator=generator)
    mask = torch.rand(size, length, generator=generator) < 0.7
    mask[0], mask[0, 0] = False, size == 1
    if spoilt:  # a token in the middle, the first of another sequence, the last of a third
        mask[-3:, [0, length // 2, -1]] = True
        states[-1, length // 2, 3] = torch.inf
        states[-2, 0, 0] = states[-3, -1, 1] = torch.nan
    return states, mask


def monitored(*batches: Batch, embedding: str = "mean", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics=METRICS, embedding=embedding, dtype=dtype, **options)
    for states, mask in batches:
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
    return {name.removesuffix("/0"): value for name, value in monitor.compute().items()}


BATCHES = {
    "fewer than features": [batch(4, 6, seed=0), batch(3, 4, seed=1)],
    "more than features": [batch(7, 5, seed=0), batch(9, 8, seed=1), batch(5, 3, seed=2)],
    "one at a time, and long": [batch(1, 43, seed=seed) for seed in range(15)],
    "long": [batch(8, 37, seed=0), batch(9, 10, seed=1)],
    "with NaN or Inf": [batch(7, 5, seed=0, spoilt=True), batch(9, 21, seed=1, spoilt=True)],
}


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("embedding", ["mean", "last", "first"])
def test_readings_are_those_of_the_matrix_of_all_vectors(kind, embedding):
    batches = BATCHES[kind]
    expected = embedding_readings(slow_vectors(batches, embedding))
    found = monitored(*batches, embedding=embedding)
    spoilt = found.pop("nonfinite_tokens", 0)
    # Of zeros a root is not as small as the rounding is.
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["embedding_matrix_entropy"] == pytest.approx(expected["embedding_matrix_entropy"], rel=1e-10)
    assert spoilt == (6 if embedding == "mean" else 2) * (kind == "with NaN or Inf")


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_stands_a_mean_that_dwarfs_the_spread(offset):
    batches = [batch(20, 30, seed=seed, offset=offset) for seed in range(3)]
    expected = embedding_readings(slow_vectors(batches, "mean"))
    found = monitored(*batches, dtype=torch.float32)
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], rel=2e-3 if offset else 2e-5), name


@pytest.mark.parametrize("count", [5, 40])
def test_rankme_is_that_of_stable_pretraining(count):
    """There: the singular values of the embeddings, divided by their sum, plus 1e-5."""
    states = torch.randn(count, 1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(states[:, 0])
    found = monitored((states, torch.ones(count, 1)))["embedding_rankme"]

    def with_epsilon(epsilon: float) -> float:
        p = s / torch.sum(s, axis=0) + epsilon
        return torch.exp(-torch.sum(p * torch.log(p))).item()

    assert found == pytest.approx(with_epsilon(0), rel=1e-10)
    assert found == pytest.approx(with_epsilon(1e-5), rel=1e-3)


def test_the_small_singular_values_of_a_collapse_are_not_rounding():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(400, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    states = (few + 1e-5 * torch.randn(400, WIDTH, generator=generator)).unsqueeze(1)
    found = monitored(*((part, torch.ones(len(part), 1)) for part in states.split(50)), dtype=torch.float32)
    expected = embedding_readings(states[:, 0].double())
    for name in ("embedding_rankme", "embedding_alpha_req"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_vectors_of_a_layer_are_taken_as_they_are():
    states = torch.randn(30, WIDTH)
    expected = embedding_readings(states.double())
    for embedding in ("mean", "last", "first"):
        model = nn.Sequential(nn.Identity())
        monitor = EntropyMonitor(model, "0", metrics=METRICS, embedding=embedding, dtype=torch.float64)
        monitor.start(sample_mask=torch.arange(20) < 17)
        for part in (states[:17], states[17:]):
            model(torch.cat([part, torch.full((20 - len(part), WIDTH), 7.0)]) if len(part) == 17 else part)
        monitor.stop()
        assert monitor.compute() == {f"{name}/0": pytest.approx(value, rel=1e-6) for name, value in expected.items()}


def test_projections_of_clip_are_read_as_they_are():
    model = make_clip().eval()
    monitor = EntropyMonitor(model, ["visual_projection", "text_projection"], metrics=METRICS, dtype=torch.float64)
    seen: dict[str, list[Tensor]] = {"visual_projection": [], "text_projection": []}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, own=own: own.append(out.detach().double()))
        for name, own in seen.items()
    ]
    with monitor, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # these are no tokens that a mask should fit
        for start in (0, 5, 9):
            model(**collate_pairs(clip_examples(16)[start : start + 5]))
        found = monitor.compute()
    for handle in handles:
        handle.remove()
    for name, vectors in seen.items():
        expected = embedding_readings(torch.cat(vectors))
        assert {metric: found[f"{metric}/{name}"] for metric in METRICS} == pytest.approx(expected, rel=1e-5)


def test_tokens_in_one_long_row_are_those_of_their_sequences():
    states, mask = batch(9, 6, seed=0)
    model = nn.Sequential(nn.Identity())
    readings = []
    for given in (states, states.flatten(0, 1)):
        monitor = EntropyMonitor(model, "0", metrics=(*METRICS, "matrix_entropy", "sequence_matrix_entropy"))
        monitor.start(attention_mask=mask)
        model(given)
        monitor.stop()
        readings.append(monitor.compute())
    assert readings[0] == readings[1]
    assert len(readings[0]) == len(METRICS) + 2


def test_documents_of_a_packed_batch_are_sequences_of_their_own(make_llama):
    model = make_llama(dropout=0.0)
    lengths = (5, 9, 3, 7)
    rows = [torch.randint(2, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    for embedding in ("mean", "last", "first"):
        monitor = EntropyMonitor(model, metrics=METRICS, embedding=embedding, dtype=torch.float64)
        with monitor:
            for row in rows:
                model(input_ids=row)
        alone = monitor.compute()
        hidden = []
        handle = model.model.norm.register_forward_hook(lambda m, a, out, seen=hidden: seen.append(out.detach()))
        with monitor:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            model(input_ids=torch.cat(rows, 1), position_ids=positions)
        handle.remove()
        parts = hidden[0][0].split(lengths)
        expected = embedding_readings(slow_vectors([(p[None], torch.ones(1, len(p))) for p in parts], embedding))
        assert monitor.compute() == {f"{n}/last": pytest.approx(v, rel=1e-6) for n, v in expected.items()}
        assert len(alone) == len(METRICS)


def test_a_sequence_that_max_tokens_cuts_has_no_vector():
    states = torch.randn(6, 5, WIDTH)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 3:] = False
    found = monitored((states, mask), max_tokens=20)
    # 3 tokens, and 15 of three sequences of 5; of the next, 2.
    assert found == pytest.approx(embedding_readings(slow_vectors([(states[:4], mask[:4])], "mean")), rel=1e-6)


def test_one_vector_has_no_spread():
    with pytest.warns(UserWarning, match="Too few valid tokens") as caught:
        found = monitored((torch.randn(1, 5, WIDTH), torch.ones(1, 5)))
    assert found.pop("embedding_rankme") == pytest.approx(1.0)
    assert len(found) == len(METRICS) - 1
    assert all(map(math.isnan, found.values()))
    few, undefined = (str(w.message) for w in caught)
    assert "at least 2 sequences, and 1 came (embedding_matrix_entropy, embedding_effective_rank, " in few
    assert "so there is no embedding_alpha_req of: 0" in undefined
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics="embedding_matrix_entropy")
    monitor.read(torch.randn(1, 5, WIDTH))
    with pytest.warns(UserWarning, match="Too few valid tokens or sequences were seen, so there is no reading of: 0"):
        assert math.isnan(monitor.compute()["embedding_matrix_entropy/0"])


@pytest.mark.filterwarnings("ignore:Numbers of")
def test_the_approximate_solver_estimates_them_with_their_error():
    states = torch.randn(1100, 2, 1100) * torch.linspace(0.1, 1, 1100)
    model = nn.Sequential(nn.Identity())
    metrics = ("embedding_matrix_entropy", "embedding_effective_rank")
    found = {}
    for solver in ("exact", "approximate"):
        monitor = EntropyMonitor(model, "0", metrics=(*metrics, "matrix_entropy"), solver=solver)
        monitor.read(states)
        found[solver] = monitor.compute()
    errors = {"matrix_entropy_error/0", "embedding_matrix_entropy_error/0"}
    assert set(found["approximate"]) - set(found["exact"]) == errors
    exact, estimated = (of["embedding_matrix_entropy/0"] for of in found.values())
    assert estimated == pytest.approx(exact, rel=0.01)
    assert found["approximate"]["embedding_effective_rank/0"] == pytest.approx(math.exp(estimated))
    assert 0 < found["approximate"]["embedding_matrix_entropy_error/0"] < 0.05
    # It has a covariance of its own, of which all eigenvalues are computed.
    monitor = EntropyMonitor(model, "0", metrics=(*metrics, "embedding_rankme"), solver="approximate")
    monitor.read(states)
    with pytest.warns(UserWarning, match="embedding_rankme cannot be estimated"):
        assert monitor.compute()["embedding_matrix_entropy/0"] == estimated


def test_compute_later_gives_the_same():
    states, mask = batch(20, 5, seed=3)
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "0", metrics=METRICS)
    finish = None
    for _ in range(2):
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
        finish = finish or monitor.compute_later()
    assert finish() == monitor.compute()


def on_rank(rank: int, world_size: int) -> tuple[dict[str, float], list[Batch]]:
    """Sequences of unlike number and length on each rank; the last rank has none."""
    model = llama(dropout=0.0)
    monitor = EntropyMonitor(model, ["last", "lm_head"], metrics=METRICS, embedding="last", dtype=torch.float64)
    seen: list[Batch] = []
    for start in range(2 * rank) if rank < world_size - 1 else []:
        own = collate(text_examples(4 + rank, start=20 * rank + 8 * start))
        with monitor:
            hidden = model(**own, output_hidden_states=True).hidden_states[-1]
        seen.append((hidden.detach(), own["attention_mask"]))
    if rank == 0:
        with monitor:
            own = collate(text_examples(2, start=200))
            seen.append((model(**own, output_hidden_states=True).hidden_states[-1].detach(), own["attention_mask"]))
    assert dist.get_world_size() == world_size
    return monitor.compute(), seen


def test_ranks_count_as_one():
    found = run_on_ranks(on_rank, 3)
    readings = [reading for reading, _ in found]
    assert readings[0] == readings[1] == readings[2]
    expected = embedding_readings(slow_vectors([own for _, seen in found for own in seen], "last"))
    assert {name: readings[0][f"{name}/last"] for name in METRICS} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("embedding", ["mean", "last", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_state_and_the_work_space_however_many_come(embedding, dtype, monkeypatch):
    work_space, d = 2**20, 128
    monkeypatch.setattr(pieces, "_PIECE", work_space // 4)
    for shape in ((1, 2**15), (2**13, 4), (2**15, 1), (2**15,)):
        states = torch.randn(*shape, d).to(dtype)
        mask = torch.rand(shape) < 0.8
        own = LayerAccumulator(
            frozenset({"embedding", "raw_embedding"}),
            max_tokens=None,
            dtype=torch.float32,
            device=torch.device("cpu"),
            embedding=embedding,
        )
        peak = peak_bytes(lambda own=own, states=states, mask=mask: own.update(states, mask))
        # Masks, and what else has one number a token, are there for all of them.
        assert peak <= work_space + (4 + 8) * d * (d + 1) + 40 * 2**15, shape


def test_vectors_that_come_beside_the_tokens_go_before_them():
    class Pools(nn.Module):
        """As a dense layer of sentence-transformers behind the pooling layer: tokens, and narrower vectors."""

        def forward(self, states: Tensor) -> dict[str, Tensor]:
            return {"token_embeddings": states, "sentence_embedding": states.mean(1)[:, :5] + 1}

    model = nn.Sequential(Pools())
    batches = [batch(9, 5, seed=0), batch(1, 4, seed=1), batch(12, 6, seed=2)]
    monitor = EntropyMonitor(model, "0", metrics=(*METRICS, "matrix_entropy"), dtype=torch.float64)
    beside = []
    for states, mask in batches:
        monitor.start(attention_mask=mask)
        beside.append(model(states)["sentence_embedding"][mask.any(1)])
        monitor.stop()
    found = monitor.compute()
    assert {name: found[f"{name}/0"] for name in METRICS} == pytest.approx(
        embedding_readings(torch.cat(beside).double())
    )
    alone = EntropyMonitor(nn.Sequential(nn.Identity()), "0", metrics="matrix_entropy", dtype=torch.float64)
    for states, mask in batches:
        alone.start(attention_mask=mask)
        alone.model(states)
        alone.stop()
    assert found["matrix_entropy/0"] == alone.compute()["matrix_entropy/0"]

    own = LayerAccumulator(frozenset({"embedding"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"`vectors` must be one for each of 2 sequences, got \(3, 4\)"):
        own.update(torch.zeros(2, 5, 4), None, torch.zeros(3, 4))
