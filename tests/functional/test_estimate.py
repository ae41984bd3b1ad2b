"""The quantities of wide covariances without their eigenvalues."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.symmetric import blocks
from matent_callbacks.functional import _estimate
from matent_callbacks.functional._estimate import estimates, project
from tests.accumulate.packed import pack

WIDTH = 1024


@pytest.fixture(scope="module")
def directions():
    torch.manual_seed(0)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]


def entropy(shares: torch.Tensor) -> float:
    shares = shares.double() / shares.double().sum()
    return -sum(share * math.log(share) for share in shares.tolist() if share > 0)


def spectra() -> dict[str, torch.Tensor]:
    index = torch.arange(1, WIDTH + 1, dtype=torch.float64)
    return {
        **{f"power law {slope}": index.pow(-slope) for slope in (0.6, 1.0, 1.5, 2.0)},
        "flat": torch.ones(WIDTH),
        "two levels": torch.cat([torch.full((128,), 63.0), torch.ones(WIDTH - 128)]),
        "an outlier": torch.cat([torch.tensor([9.0 * (WIDTH - 1)]), torch.ones(WIDTH - 1)]),
    }


@pytest.mark.parametrize("name", spectra())
def test_estimates_are_within_their_error_and_the_rest_is_exact(name, directions):
    values = spectra()[name]
    matrix = ((directions * values) @ directions.T).float()
    one = estimates([project([7 * matrix], seed=seed) for seed in range(4)], WIDTH)
    exact = entropy(values)
    for found, error in zip(one.entropy.tolist(), one.error.tolist(), strict=True):
        assert found == pytest.approx(exact, rel=1e-3)
        assert abs(found - exact) <= 4 * error
        assert error < 5e-4 * exact
    shares = values / values.sum()
    assert one.squares.tolist() == pytest.approx([shares.square().sum().item()] * 4, rel=1e-5)
    assert one.top[0, :16].tolist() == pytest.approx(shares[:16].tolist(), rel=2e-3)
    # In blocks it is the same, and it is the same again.
    again = estimates([project(blocks(pack(7 * matrix)))], WIDTH)
    assert again.entropy.item() == pytest.approx(one.entropy[0].item(), abs=3e-4)
    assert torch.equal(again.entropy, estimates([project(blocks(pack(7 * matrix)))], WIDTH).entropy)


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_few_directions_are_exact(rank, directions):
    part = directions[:, :rank].float()
    found = estimates([project([part @ part.T])], WIDTH)
    assert found.entropy.item() == pytest.approx(math.log(max(rank, 1)), abs=5e-4)


def test_the_error_tells_of_too_few_steps(directions):
    values = torch.exp(-torch.arange(WIDTH, dtype=torch.float64) / 50) + 1e-6
    matrix = ((directions * values) @ directions.T).float()
    exact = entropy(values)
    few, more = (estimates([project([matrix], steps=steps)], WIDTH) for steps in (4, 10))
    assert abs(few.entropy.item() - exact) > 4 * abs(more.entropy.item() - exact)
    assert few.error.item() > 4 * more.error.item()
    for found in (few, more):
        assert abs(found.entropy.item() - exact) <= 3 * found.error.item()


def test_what_is_not_finite_has_no_estimate(directions):
    matrix = (directions @ directions.T).float()
    broken = matrix.clone()
    broken[3, 3] = torch.nan
    found = estimates([project([matrix]), project([broken])], WIDTH)
    assert found.entropy.isnan().tolist() == [False, True]


def test_probes_are_normal_and_those_of_other_seeds_independent():
    one, other = (_estimate.normal(4096, 32, seed, torch.empty(0)).double() for seed in (0, 1))
    assert one.mean().item() == pytest.approx(0, abs=0.01)
    assert [one.pow(k).mean().item() for k in (2, 4)] == pytest.approx([1, 3], rel=0.03)
    for product in (one.T @ one / 4096 - torch.eye(32), one.T @ other / 4096):
        assert product.abs().max() < 0.1


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
    monitor = readings(wide(), "auto", tokens, metrics=names)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="Numbers of 0 are estimated, to 0.2 %, since they are wide") as caught:
        found = monitor.compute()
    assert len(caught) == 1
    assert torch.equal(torch.get_rng_state(), before)
    exact = readings(wide(), "exact", tokens, metrics=names).compute()
    assert 0 < found.pop("matrix_entropy_error/0") < 0.001 * exact["matrix_entropy/0"]
    assert found["matrix_entropy/0"] == pytest.approx(exact["matrix_entropy/0"], rel=0.002)
    assert found["matrix_entropy/0"] != exact["matrix_entropy/0"]
    assert found["normalized_matrix_entropy/0"] == pytest.approx(exact["normalized_matrix_entropy/0"], rel=0.002)
    assert found["effective_rank/0"] == pytest.approx(math.exp(found["matrix_entropy/0"]), rel=1e-5)
    assert found["sequence_matrix_entropy/0"] == exact["sequence_matrix_entropy/0"]
    few = torch.randn(2, 30, WIDTH)
    assert readings(wide(), "auto", few).compute() == readings(wide(), "exact", few).compute()
    narrow = torch.randn(2, 90, 64)
    later = readings(wide(64), "auto", narrow).compute_later()
    assert later() == readings(wide(64), "exact", narrow).compute()


SERVED = {
    "matrix_entropy": 0.002,
    "effective_rank": 0.01,
    "renyi_2": 1e-4,
    "participation_ratio": 1e-4,
    "stable_rank": 0.002,
    "top_share": 0.002,
    "spectrum": 0.002,
    "top_dimension_share": 1e-5,
    "correlation_effective_rank": 0.01,
    "holevo_information": 0.02,
}


@pytest.mark.filterwarnings("ignore:Numbers of")
def test_all_that_needs_no_eigenvalues_is_served():
    tokens = torch.randn(4, 400, WIDTH) * torch.arange(1, WIDTH + 1).pow(-0.3)
    found, exact = (readings(wide(), solver, tokens, metrics=list(SERVED)).compute() for solver in ("auto", "exact"))
    missing = {f"spectrum_top_{2**i}/0" for i in range(5, 10)}
    assert exact.keys() - found.keys() == missing
    assert found.keys() - exact.keys() == {"matrix_entropy_error/0", "correlation_matrix_entropy_error/0"}
    for key in exact.keys() & found.keys():
        bound = SERVED["spectrum" if key.startswith("spectrum") else key.partition("/")[0]]
        assert found[key] == pytest.approx(exact[key], rel=bound), key
    # Of squares alone there is no error to tell.
    assert readings(wide(), "auto", tokens, metrics="renyi_2").compute().keys() == {"renyi_2/0"}


def test_what_takes_all_eigenvalues_is_exact_and_told_in_one_sentence():
    tokens = torch.randn(1, 1100, WIDTH)
    names = ["matrix_entropy", "alpha_req", "rankme"]
    monitor = readings(wide(), "auto", tokens, metrics=names)
    told = "All eigenvalues of 0 are computed, .* since these layers are wide: alpha_req, rankme cannot be estimated"
    with pytest.warns(UserWarning, match=told) as caught:
        found = monitor.compute()
    assert len(caught) == 1
    assert found == readings(wide(), "exact", tokens, metrics=names).compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readings(wide(), "auto", torch.randn(1, 90, WIDTH), metrics=names).compute()


@pytest.mark.filterwarnings("ignore:Numbers of")
def test_reduced_precision_of_the_process_does_not_reach_the_estimate(monkeypatch):
    tokens = torch.randn(1, 1100, WIDTH)
    plain = readings(wide(), "auto", tokens, metrics="matrix_entropy").compute()
    dtypes = []
    product = _estimate.krylov
    monkeypatch.setattr(
        "matent_callbacks.functional._estimate.krylov",
        lambda multiply, probes, *rest: (dtypes.append(probes.dtype), product(multiply, probes, *rest))[1],
    )
    monitor = readings(wide(), "auto", tokens, metrics="matrix_entropy")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            later = monitor.compute_later()()
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == [torch.float64]
    assert later["matrix_entropy/0"] == pytest.approx(plain["matrix_entropy/0"], rel=1e-5)


def test_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="`solver` must be 'auto', 'exact' or 'approximate', got 'fast'"):
        EntropyMonitor(wide(8), "0", solver="fast")
