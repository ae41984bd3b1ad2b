from __future__ import annotations

import pytest
import torch

from matent_callbacks import EffectiveRank, MatrixEntropy, SequenceEffectiveRank, SequenceMatrixEntropy
from matent_callbacks.functional import effective_rank, matrix_entropy, sink_tokens, spectrum


def tokens(*lengths: float, width: int = 16) -> torch.Tensor:
    """Random directions of the given lengths."""
    torch.manual_seed(0)
    x = torch.randn(len(lengths), width)
    return x / x.norm(dim=1, keepdim=True) * torch.tensor(lengths).unsqueeze(1)


def test_a_token_is_a_sink_from_4_times_the_geometric_mean_on():
    rest = [1.0] * 63
    # With one token of length r among 64 the geometric mean is r^(1/64): r^(63/64) = 4 at r = 4.089.
    assert sink_tokens(tokens(4.07, *rest)).sum() == 0
    assert sink_tokens(tokens(4.11, *rest)).tolist() == [True] + [False] * 63


@pytest.mark.parametrize(("number", "most"), [(3, 0), (4, 1), (16, 4), (128, 8), (1024, 16)])
@pytest.mark.parametrize("further", [0, 1])
def test_many_long_tokens_are_a_kind_of_token(number: int, most: int, further: int):
    long = most + further
    found = sink_tokens(tokens(*[1e6] * long, *[1.0] * (number - long)))
    assert found.tolist() == [not further] * long + [False] * (number - long)


def test_each_sequence_has_its_own_sinks_among_the_tokens_that_count():
    states = torch.stack([tokens(*[1.0] * 8), tokens(50, *[1.0] * 7), tokens(50, *[1.0] * 7)])
    mask = torch.ones(3, 8)
    mask[2, 0] = 0
    assert sink_tokens(states, mask).nonzero().tolist() == [[1, 0]]
    # A row of padding that is long makes no other token short.
    padding = torch.cat([states[1], 1e6 * torch.ones(40, 16)])
    assert sink_tokens(padding, torch.tensor([1] * 8 + [0] * 40)).nonzero().tolist() == [[0]]


def test_tokens_without_a_length_neither_count_nor_are_sinks():
    states = tokens(50, *[1.0] * 11)
    states[3], states[4], states[5] = 0.0, torch.nan, torch.inf
    assert sink_tokens(states).nonzero().tolist() == [[0]]
    assert not sink_tokens(torch.zeros(8, 4)).any()
    assert sink_tokens(torch.zeros(2, 0, 4)).shape == (2, 0)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1.0, 1e12, 1e30, 3e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_does_not_matter(scale: float, dtype: torch.dtype):
    found = sink_tokens((tokens(50, *[1.0] * 11).double() * scale).to(dtype))
    assert found.nonzero().tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    # The squares are beyond float16.
    assert sink_tokens(tokens(20000, *[300.0] * 11).to(dtype)).nonzero().tolist() == [[0]]


def test_functions_and_metrics_leave_sinks_out_if_asked_to():
    torch.manual_seed(0)
    states = torch.randn(3, 20, 16)
    states[:2, 0] *= 100
    mask = torch.ones(3, 20)
    mask[:2, 0] = 0
    for function in (matrix_entropy, effective_rank, spectrum):
        assert function(states, exclude_sinks=True).allclose(function(states, mask), atol=1e-6)
        assert not function(states).allclose(function(states, mask), rtol=0.1)
    for kind in (MatrixEntropy, EffectiveRank, SequenceMatrixEntropy, SequenceEffectiveRank):
        without, masked, everything = kind(exclude_sinks=True), kind(), kind()
        without.update(states)
        masked.update(states, mask)
        everything.update(states)
        assert without.compute() == pytest.approx(masked.compute().item(), rel=1e-6)
        assert everything.compute() != pytest.approx(masked.compute().item(), rel=0.05)
        # They are of other tokens.
        with pytest.raises(ValueError, match="other settings"):
            without.merge_state(everything)
