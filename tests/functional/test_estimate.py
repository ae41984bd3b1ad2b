"""The entropy of wide covariances without their eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch

from matent_callbacks import EntropyMonitor
from matent_callbacks.functional._estimate import estimate_entropy
from matent_callbacks.functional.entropy import entropy_of_matrix

WIDTH = 1024


@pytest.fixture(scope="module")
def directions():
    torch.manual_seed(0)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 2.0])
def test_power_laws_are_met_to_one_percent_with_their_error(slope, directions):
    matrix = (directions * torch.arange(1, WIDTH + 1).pow(-slope)) @ directions.T
    exact = entropy_of_matrix(matrix).item()
    found, error = map(float, estimate_entropy(7 * matrix))
    assert found == pytest.approx(exact, rel=0.01)
    assert abs(found - exact) < 8 * error + 1e-4
    assert estimate_entropy(7 * matrix)[0].item() == found


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_few_directions_are_exact(rank, directions):
    part = directions[:, :rank]
    found, _ = estimate_entropy(part @ part.T)
    assert found.item() == pytest.approx(math.log(max(rank, 1)), abs=1e-4)


def wide(width: int = WIDTH):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(width, width)))


def readings(model, solver, tokens, **arguments):
    monitor = EntropyMonitor(
        model, "0", solver=solver, metrics=arguments.pop("metrics", ["effective_rank"]), **arguments
    )
    with monitor, torch.no_grad():
        model(tokens)
    return monitor


def test_monitor_estimates_wide_layers_only():
    tokens = torch.randn(1, 1100, WIDTH) * torch.arange(1, WIDTH + 1).pow(-0.5)
    names = ["matrix_entropy", "normalized_matrix_entropy", "effective_rank", "sequence_matrix_entropy"]
    monitor = readings(wide(), "approximate", tokens, metrics=names)
    before = torch.get_rng_state()
    found = monitor.compute()
    assert torch.equal(torch.get_rng_state(), before)
    exact = readings(wide(), "exact", tokens, metrics=names).compute()
    assert 0 < found.pop("matrix_entropy_error/0") < 0.01 * exact["matrix_entropy/0"]
    assert found["matrix_entropy/0"] == pytest.approx(exact["matrix_entropy/0"], rel=0.01)
    assert found["matrix_entropy/0"] != exact["matrix_entropy/0"]
    assert found["normalized_matrix_entropy/0"] == pytest.approx(exact["normalized_matrix_entropy/0"], rel=0.01)
    assert found["effective_rank/0"] == pytest.approx(math.exp(found["matrix_entropy/0"]), rel=1e-5)
    assert found["sequence_matrix_entropy/0"] == exact["sequence_matrix_entropy/0"]
    few = torch.randn(2, 30, WIDTH)
    assert readings(wide(), "approximate", few).compute() == readings(wide(), "exact", few).compute()
    narrow = torch.randn(2, 90, 64)
    later = readings(wide(64), "approximate", narrow).compute_later()
    assert later() == readings(wide(64), "exact", narrow).compute()


def test_what_it_does_not_give_is_told():
    with pytest.raises(ValueError, match=r"`solver='approximate'` gives matrix_entropy, .* asks for 'top_share'"):
        EntropyMonitor(wide(8), "0", solver="approximate", metrics=["matrix_entropy", "top_share"])
    with pytest.raises(ValueError, match="`solver` must be 'exact' or 'approximate', got 'fast'"):
        EntropyMonitor(wide(8), "0", solver="fast")
