"""Hidden states that are read a piece at a time: the same values, and memory that does not grow with their number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks._timing import peak_bytes
from matent_callbacks import EntropyMonitor, MatrixEntropy, SequenceMatrixEntropy
from matent_callbacks.accumulate import pieces
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.pieces import WORK_SPACE, LongSequence, slices
from matent_callbacks.accumulate.sequences import in_groups
from matent_callbacks.functional import matrix_entropy, spectral_summary, spectrum
from matent_callbacks.functional._tokens import prepare_tokens
from tests.conftest import slow_entropy, slow_pooled_entropy

WIDTH = 24
SOURCES = ("pooled", "raw", "sequence")


@pytest.fixture
def tiny_pieces(monkeypatch):
    """Pieces of 10 tokens of WIDTH float32 numbers."""
    monkeypatch.setattr(pieces, "_PIECE", 10 * WIDTH * 4)


def batch(size: int, length: int, *, padded: bool = False, offset: float = 0.0, spoilt: bool = False):
    generator = torch.Generator().manual_seed(size + length)
    spread = torch.linspace(0.2, 2, WIDTH)
    states = offset + spread * torch.randn(size, length, WIDTH, generator=generator)
    mask = torch.ones(size, length, dtype=torch.bool)
    if padded:
        mask[:, -(length // 3) :] = False
        mask[0, : length // 3] = False
    if spoilt:
        states[0, length // 2, 3] = torch.inf
        states[-1, 0, 0] = torch.nan
    return states, mask


def monitored(metrics, *batches, dtype=torch.float32) -> dict[str, float]:
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, "*", metrics=metrics, dtype=dtype)
    for states, mask in batches:
        monitor.start(attention_mask=mask)
        model(states)
        monitor.stop()
    return monitor.compute()


# More and fewer tokens than features, one more and one less than fits, one long and many short sequences.
SHAPES = [(1, 100), (1, 21), (3, 50), (3, 11), (40, 3), (7, 10), (13, 1), (1, 9)]


def test_slices_cover_all_about_evenly():
    for total, most in [(0, 3), (1, 3), (3, 3), (4, 3), (100, 7)]:
        found = list(slices(total, most))
        assert [i for s in found for i in range(total)[s]] == list(range(total))
        lengths = [s.stop - s.start for s in found]
        assert max(lengths) <= most
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "padded", "offset", "spoilt"])
def test_pieces_are_the_prepared_tokens(shape, center, normalize, kind):
    states, mask = batch(
        *shape, padded=kind == "padded" and shape[1] > 5, offset=1000.0 * (kind == "offset"), spoilt=kind == "spoilt"
    )
    options = {"center": center, "normalize": normalize}
    expected = prepare_tokens(states.double(), mask, dtype=torch.float64, **options)
    groups = in_groups(states, mask, dtype=torch.float32)
    found = [piece for group in groups for piece in group.pieces(**options)]
    assert max(piece.tokens.valid.numel() for piece in found) <= 10
    values = torch.cat([piece.tokens.values.flatten(0, 1) for piece in found]).view(states.shape)
    torch.testing.assert_close(values, expected.values.float(), rtol=1e-4, atol=2e-4)
    valid = torch.cat([piece.tokens.valid.flatten() for piece in found]).view(mask.shape)
    assert torch.equal(valid, expected.valid)
    assert sum(piece.tokens.nonfinite for piece in found) == expected.nonfinite
    assert sum(piece.num_sequences for piece in found) == expected.valid.any(-1).sum()
    # Nothing is handed out that the model may write into.
    storages = {piece.tokens.values.untyped_storage().data_ptr() for piece in found}
    assert states.untyped_storage().data_ptr() not in storages


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readings_are_those_of_the_definition(shape, padded, dtype):
    states, mask = batch(*shape, padded=padded, offset=3.0)
    states = states.to(dtype)
    metrics = ("matrix_entropy", "rankme", "sequence_matrix_entropy")
    found = monitored(metrics, (states, mask), dtype=torch.float64)
    rows = states[mask].double()
    expected = {
        "matrix_entropy": slow_pooled_entropy(states, mask),
        "rankme": spectral_summary(spectrum(rows, center=False, normalize=False))["rankme"].item(),
        "sequence_matrix_entropy": sum(slow_entropy(z, m) for z, m in zip(states, mask, strict=True)) / shape[0],
    }
    # It takes roots of eigenvalues: those of zeros are not as small as the rounding is.
    rel = {"rankme": 1e-6}
    assert found == {f"{name}/0": pytest.approx(value, rel=rel.get(name, 1e-9)) for name, value in expected.items()}
    single = monitored(metrics, (states, mask))
    rel = {"rankme": 5e-3}
    assert single == {f"{name}/0": pytest.approx(value, rel=rel.get(name, 1e-5)) for name, value in expected.items()}


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_metric_classes_do_not_depend_on_the_size_of_the_pieces(monkeypatch, offset):
    batches = [batch(2, 50, padded=True, offset=offset), batch(30, 4, offset=offset), batch(1, 13, offset=offset)]

    def values(cls, **arguments) -> Tensor:
        found = []
        for options in ({}, {"alpha": 2.0}, {"normalize": False}, {"normalize_by": "log_rank"}):
            metric = cls(**arguments, **options)
            for states, mask in batches:
                metric.update(states, mask)
            found.append(metric.compute())
        return torch.stack(found)

    for cls, centers in ((MatrixEntropy, ("sequence", "global", None)), (SequenceMatrixEntropy, (True, False))):
        for center in centers:
            with monkeypatch.context() as patch:
                whole = values(cls, center=center, dtype=torch.float64)
                patch.setattr(pieces, "_PIECE", 10 * WIDTH * 8)
                assert torch.allclose(values(cls, center=center, dtype=torch.float64), whole, rtol=1e-10, atol=1e-12)
                assert torch.allclose(values(cls, center=center).double(), whole, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("length", [15, WIDTH - 1, WIDTH, 60])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_long_sequence_gives_gram_matrix_and_covariance(length, center, normalize):
    states, mask = batch(1, length, padded=True, spoilt=True, offset=2.0)
    options = {"center": center, "normalize": normalize, "dtype": torch.float64}
    sequence = LongSequence(states[0], mask[0], **options)
    z = prepare_tokens(states, mask, **options).values[0]
    torch.testing.assert_close(sequence.gram(), z @ z.T)
    assert sequence.has_fewer_tokens_than_features == (length < WIDTH)
    moments = sequence.moments()
    assert (moments.num_tokens, moments.num_nonfinite) == (sequence.valid.sum(), sequence.nonfinite)
    own = LayerAccumulator(frozenset({"sequence"}), max_tokens=None, dtype=torch.float64, device=torch.device("cpu"))
    if center and normalize:
        torch.testing.assert_close(own.update(states, mask), matrix_entropy(states.double(), mask))


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("shape", [(0, 5), (0, 100), (2, 0)])
def test_a_batch_without_tokens(shape):
    states = torch.zeros(*shape, WIDTH)
    for cls in (MatrixEntropy, SequenceMatrixEntropy):
        metric = cls()
        metric.update(states)
        metric.update(torch.eye(WIDTH))
        twin = cls()
        twin.update(torch.eye(WIDTH))
        assert torch.equal(metric.compute(), twin.compute())


def accumulator(*sources, dtype=torch.float32) -> LayerAccumulator:
    return LayerAccumulator(frozenset(sources), max_tokens=None, dtype=dtype, device=torch.device("cpu"))


KINDS = {
    "one long sequence": lambda tokens: (1, tokens),
    "long sequences": lambda tokens: (4, tokens // 4),
    "short sequences": lambda tokens: (tokens // 64, 64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_an_update_is_the_state_and_the_work_space_however_many_tokens_come(kind, padded, dtype, monkeypatch):
    work_space, d = 2**22, 128
    monkeypatch.setattr(pieces, "_PIECE", work_space // 4)
    state = 4 * d * (d + 1) // 2
    # Per sequence a matrix, and the solver's copy of it, are part of what is allowed.
    allowed = {("pooled",): state, ("raw",): state + 4 * d, ("sequence",): state + 8 * d * d}
    for sources, own in allowed.items():
        # Twice and eight times as many as in float32 would fill the work space.
        few, many = (peak_of_update(sources, KINDS[kind](tokens), d, padded, dtype) for tokens in (2**14, 2**16))
        # Masks, and what else has one number a token, are there for all of them.
        assert many - few <= 40 * (2**16 - 2**14), sources
        assert few <= work_space + own + 40 * 2**14, sources


@pytest.mark.parametrize("shape", [(1, 2**12), (2**7, 32)])
@pytest.mark.parametrize("center", ["sequence", "global", None])
def test_an_update_writes_into_the_state_that_is_there(shape, center, monkeypatch):
    work_space, d = 2**20, 1024  # the state is twice as large
    monkeypatch.setattr(pieces, "_PIECE", work_space // 4)
    metric, layer = MatrixEntropy(center=center), accumulator("pooled", "raw")
    states = torch.randn(*shape, d)
    metric.update(states)
    layer.update(states, None)
    allowed = work_space + 40 * states.shape[:-1].numel()
    assert peak_bytes(lambda: metric.update(states)) <= allowed
    assert peak_bytes(lambda: layer.update(states, None)) <= allowed


def test_memory_of_a_batch_of_many_times_the_work_space():
    """With the work space as it is: 65,536 tokens, which take 128 MiB in float32, and all that can be asked for."""
    d = 512
    state = 4 * d * (d + 1) + 4 * d
    for shape in ((1, 2**16), (2**10, 64)):
        peak = peak_of_update(SOURCES, shape, d, True, torch.bfloat16)
        assert peak <= WORK_SPACE + state + 8 * d * d
        assert peak > WORK_SPACE / 4  # something was measured


def peak_of_update(sources, shape, d: int, padded: bool, dtype: torch.dtype) -> int:
    states = torch.randn(*shape, 1).to(dtype) * torch.randn(d).to(dtype) + torch.randn(d).to(dtype)
    mask = torch.ones(shape, dtype=torch.bool)
    if padded:
        mask[:, -(mask.shape[1] // 4) :] = False
    own = accumulator(*sources)
    return peak_bytes(lambda: own.update(states, mask))
