"""The formulas against the slow definition, closed forms and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from matent_callbacks.functional import effective_rank, matrix_entropy, spectral_summary, spectrum
from tests.conftest import slow_entropy
from tests.functional.reduced import reduced_matmul

SIZES = [(n, d) for n in (2, 5, 64, 300) for d in (16, 64, 768)]


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_entropy_is_the_definition(n, d):
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n * d)) @ torch.diag(
        torch.linspace(0.01, 3, d, dtype=torch.float64)
    )
    assert matrix_entropy(z).item() == pytest.approx(slow_entropy(z), abs=1e-9)
    assert effective_rank(z).item() == pytest.approx(math.exp(slow_entropy(z)), rel=1e-9)
    assert matrix_entropy(z.float()).item() == pytest.approx(slow_entropy(z), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filling", [0.0, 1e30, float("nan"), float("inf")])
def test_padding_changes_nothing(side, filling):
    z = torch.randn(3, 20, 8, dtype=torch.float64)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    mask[2, 5:] = 0
    if side == "left":
        mask = mask.flip(1)
    expected = [slow_entropy(z[i], mask[i]) for i in range(3)]
    padded = torch.where(mask.bool().unsqueeze(-1), z, filling)
    assert matrix_entropy(padded, mask).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(spectrum(padded, mask), spectrum(z * mask.unsqueeze(-1), mask))


def test_spectrum_has_the_promised_shape_order_and_sum():
    for shape, expected in [((5, 9), (5,)), ((9, 5), (5,)), ((2, 5, 9), (2, 5)), ((2, 9, 5), (2, 5))]:
        values = spectrum(torch.randn(shape))
        assert values.shape == expected
        assert torch.all(values.diff(dim=-1) <= 0)
        assert torch.allclose(values.sum(-1), torch.ones(expected[:-1]))
    # Centred tokens have rank N - 1 at the most: the last one of a Gram spectrum is zero.
    assert spectrum(torch.randn(5, 9, dtype=torch.float64))[-1].item() == pytest.approx(0, abs=1e-15)


def test_closed_forms():
    d = 16
    both_signs = torch.cat([torch.eye(d), -torch.eye(d)]).double()  # mean zero, identity covariance
    assert matrix_entropy(both_signs).item() == pytest.approx(math.log(d), abs=1e-12)
    line = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(1) * torch.randn(d, dtype=torch.float64)
    assert matrix_entropy(line).item() == pytest.approx(0, abs=1e-12)
    # Unnormalised tokens along the axes with lengths s_j have the spectrum s_j^2 / sum s^2.
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    axes = torch.cat([torch.diag(s), -torch.diag(s)])
    share = s.square() / s.square().sum()
    assert torch.allclose(spectrum(axes, normalize=False), share)
    assert matrix_entropy(axes, normalize=False).item() == pytest.approx(-(share * share.log()).sum().item())


@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0, math.inf])
def test_renyi_orders(alpha):
    z = torch.randn(40, 12, dtype=torch.float64)
    share = spectrum(z)
    expected = -share.max().log() if alpha == math.inf else share.pow(alpha).sum().log() / (1 - alpha)
    assert matrix_entropy(z, alpha=alpha).item() == pytest.approx(expected.item(), abs=1e-10)
    assert matrix_entropy(z, alpha=1 + 1e-6).item() == pytest.approx(matrix_entropy(z).item(), abs=1e-5)


def test_degenerate_sequences():
    same = torch.ones(2, 4, 3)
    assert matrix_entropy(same).tolist() == [0, 0]
    assert effective_rank(same).tolist() == [1, 1]
    assert torch.equal(spectrum(same), torch.zeros(2, 3))
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.isnan(matrix_entropy(torch.randn(2, 4, 3), mask)).all()
    # Without centring one token is enough.
    assert matrix_entropy(torch.randn(2, 4, 3), mask, center=False).isnan().tolist() == [False, True]


def test_tokens_with_nan_or_inf_are_left_out():
    z = torch.randn(10, 6, dtype=torch.float64)
    dirty = torch.cat([z, torch.full((1, 6), float("nan")).double(), torch.full((1, 6), -float("inf")).double()])
    assert matrix_entropy(dirty).item() == pytest.approx(slow_entropy(z), abs=1e-9)


@pytest.mark.parametrize("distance", [0.0, 6.0, 10.0, 1e3, 1e5])
def test_mean_that_dwarfs_the_spread_is_taken_out_to_the_last_digit(distance):
    torch.manual_seed(0)
    hidden = torch.randn(4, 64, 32) + distance * torch.randn(32)
    assert matrix_entropy(hidden).tolist() == pytest.approx(matrix_entropy(hidden.double()).tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_and_autocast_are_measured_in_float32(dtype):
    z = torch.randn(4, 30, 16).to(dtype)
    expected = matrix_entropy(z.float())
    assert torch.equal(matrix_entropy(z), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix_entropy(z), expected)
        assert torch.is_autocast_enabled("cpu")


def test_reduced_matmul_precision_is_set_aside_and_put_back():
    z = torch.randn(4, 300, 64)
    expected = matrix_entropy(z)
    with reduced_matmul():
        assert torch.equal(matrix_entropy(z), expected)


def test_spectral_summary_against_its_definitions():
    z = torch.randn(50, 8, dtype=torch.float64) @ torch.diag(torch.arange(1, 9).double().pow(-1.5))
    values = spectrum(z)
    summary = {name: value.item() for name, value in spectral_summary(values).items()}
    sigma = values.sqrt() / values.sqrt().sum()
    slope = (
        torch.linalg.lstsq(
            torch.stack([torch.arange(1, 9).double().log(), torch.ones(8).double()], 1), values.log().unsqueeze(1)
        )
        .solution[0]
        .item()
    )
    assert summary == {
        "matrix_entropy": pytest.approx(slow_entropy(z)),
        "normalized_matrix_entropy": pytest.approx(slow_entropy(z) / math.log(8)),
        "effective_rank": pytest.approx(math.exp(slow_entropy(z))),
        "renyi_2": pytest.approx(-values.square().sum().log().item()),
        "participation_ratio": pytest.approx((values.sum() ** 2 / values.square().sum()).item()),
        "stable_rank": pytest.approx((values.sum() / values.max()).item()),
        "top_share": pytest.approx(values.max().item()),
        "numerical_rank": 8,
        "alpha_req": pytest.approx(-slope),
        "rankme": pytest.approx((-(sigma * sigma.log()).sum()).exp().item()),
    }
    # Of any scale, and in batches.
    batched = spectral_summary(torch.stack([values, 7 * values]))
    assert all(torch.allclose(value[0], value[1], equal_nan=True) for value in batched.values())


def test_rankme_is_that_of_the_embedding_matrix():
    z = torch.randn(60, 10, dtype=torch.float64) + 3
    sigma = torch.linalg.svdvals(z)
    p = sigma / sigma.sum()
    rankme = spectral_summary(spectrum(z, center=False, normalize=False))["rankme"].item()
    assert rankme == pytest.approx((-(p * p.log()).sum()).exp().item())


def test_power_law_slope_is_found_and_needs_two_eigenvalues():
    exact = torch.arange(1, 50).double().pow(-1.3)
    assert spectral_summary(exact)["alpha_req"].item() == pytest.approx(1.3)
    assert spectral_summary(torch.tensor([1.0, 0.0]))["alpha_req"].isnan()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 3, 4, 5),), ValueError, r"`hidden_states` must have shape .* got \(2, 3, 4, 5\)"),
        ((torch.randn(3),), ValueError, r"`hidden_states` must have shape .* got \(3,\)"),
        ((torch.ones(3, 4, dtype=torch.long),), TypeError, r"`hidden_states` must be a floating .* got torch.int64"),
        (([[1.0]],), TypeError, r"`hidden_states` must be a torch.Tensor, got list"),
        ((torch.randn(2, 3, 4), torch.ones(2, 4)), ValueError, r"`attention_mask` .* \(2, 3\), got \(2, 4\)"),
        ((torch.randn(3, 4), torch.ones(1, 3)), ValueError, r"`attention_mask` .* \(3,\), got \(1, 3\)"),
        ((torch.randn(3, 4), [1, 1, 1]), TypeError, r"`attention_mask` must be a torch.Tensor or None, got list"),
        ((torch.randn(3, 0),), ValueError, r"`hidden_states` must have at least one feature"),
    ],
)
@pytest.mark.parametrize("function", [spectrum, matrix_entropy, effective_rank])
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_bad_orders_and_spectra_are_named():
    with pytest.raises(ValueError, match="`alpha` must be above 0, got -1"):
        matrix_entropy(torch.randn(3, 4), alpha=-1)
    with pytest.raises(TypeError, match=r"`eigenvalues` must be a floating point tensor, got torch.int64"):
        spectral_summary(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"`eigenvalues` must have shape \(..., k\)"):
        spectral_summary(torch.tensor(1.0))
