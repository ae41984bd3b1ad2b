"""What a layer keeps during one reading."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.statistics import OF_WHOLE_SEQUENCES, STATISTICS
from matent_callbacks.monitor.readings import PendingReadings

WIDTH = 32
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def accumulated(forwards: int, *, dtype: torch.dtype = torch.float32, max_tokens: int | None = None):
    """Three sequences in each forward, 9 tokens in 12 places; one token is NaN, and the mean dwarfs the spread."""
    torch.manual_seed(0)
    accumulator = LayerAccumulator(
        frozenset({"pooled", "raw"}), max_tokens=max_tokens, dtype=dtype, device=torch.device("cpu")
    )
    for index in range(forwards):
        states = 100 + torch.randn(3, 4, WIDTH)
        if index == 0:
            states[0, 1] = torch.nan
        accumulator.update(states, MASK)
    return accumulator


def readings(accumulator):
    names = [
        name for name, row in CATALOGUE.items() if row.source in ("pooled", "raw") and name != "holevo_information"
    ]
    return PendingReadings({"layer": accumulator}, names).result()


@pytest.mark.parametrize(("forwards", "size"), [(1, 12), (2, 24), (3, WIDTH), (5, WIDTH)])
def test_the_smaller_of_gram_matrix_and_covariance_is_decomposed_with_the_same_outcome(forwards, size):
    accumulator, by_moments = accumulated(forwards), accumulated(forwards)
    for source in ("pooled", "raw"):
        by_moments.tokens[source].moments()
        assert accumulator.tokens[source].matrix().lower().shape == (size, size)
        assert by_moments.tokens[source].matrix().lower().shape == (WIDTH, WIDTH)
    expected = readings(by_moments)
    assert expected.nonfinite == {"layer": 1}
    assert readings(accumulator).nonfinite == expected.nonfinite
    assert readings(accumulator).values["layer"] == {
        # Its mean is 100 times the spread: what the covariance keeps of the small directions is float32's.
        name: pytest.approx(value, rel=1e-3 if name in CATALOGUE and CATALOGUE[name].source == "raw" else 2e-5)
        for name, value in expected.values["layer"].items()
    }


def test_kept_tokens_never_take_more_than_a_covariance():
    accumulator = accumulated(20)
    held = accumulator.tokens["pooled"]
    assert sum(tokens.values.numel() for tokens in held._kept) + held._moments.scatter.numel() <= WIDTH**2
    kept = accumulated(2).tokens["pooled"]._kept
    assert 0 < sum(tokens.values.numel() for tokens in kept) <= WIDTH**2


def test_another_width_is_an_error_and_leaves_what_was_there():
    for forwards in (1, 3):
        accumulator = accumulated(forwards)
        before = readings(accumulator)
        with pytest.raises(ValueError, match=f"had {WIDTH} features before and has 5 now"):
            accumulator.update(torch.randn(2, 3, 5), None)
        assert readings(accumulator).values == before.values


def test_max_tokens_holds_across_the_change_from_tokens_to_moments():
    limited = accumulated(5, max_tokens=40)
    # Four forwards and the first sequence of the fifth; the NaN is one of them, and what is masked is not.
    assert limited.tokens["pooled"].matrix().moments.num_tokens == 4 * 9 + 4 - 1


def test_padding_takes_nothing_from_max_tokens():
    whole, limited = accumulated(5), accumulated(5, max_tokens=5 * 9)
    assert readings(limited).values == readings(whole).values
    # Without a mask nothing is padding, and what is beyond the budget is not even looked at.
    for mask in (None, torch.ones(3, 4)):
        accumulator = LayerAccumulator(
            frozenset({"pooled"}), max_tokens=14, dtype=torch.float32, device=torch.device("cpu")
        )
        for _ in range(3):
            accumulator.update(torch.randn(3, 4, WIDTH), mask)
        assert accumulator.tokens["pooled"].matrix().moments.num_tokens == 14


@pytest.mark.parametrize("embedding", ["mean", "last", "first"])
@pytest.mark.parametrize("shape", [(4, 20), (1, 3000)])
def test_what_is_of_sequences_never_makes_the_host_wait_for_the_device(embedding, shape):
    # The lengths of tokens are looked at on the CPU: tests/monitor/test_fake_cuda.py has them on a device.
    sources = frozenset(source for source in OF_WHOLE_SEQUENCES if not STATISTICS[source].needs_norms)
    with FakeTensorMode():  # a look at a value is an error
        own = LayerAccumulator(
            sources, max_tokens=None, dtype=torch.float32, device=torch.device("cpu"), embedding=embedding
        )
        own.update(torch.ones(*shape, 4096, dtype=torch.bfloat16), torch.ones(shape))
        with pytest.raises(DataDependentOutputException):
            own.states()["curvature"].mean.item()
