"""What moved between two representations of the same tokens, against written-out definitions."""

from __future__ import annotations

import pytest
import torch

from matent_callbacks.functional import debiased_cka, subspace_overlap, token_cosine
from matent_callbacks.functional.drift import compare_tokens


def hsic(gram_x, gram_y):
    """The unbiased estimator of Song et al. 2012, equation 5, of whole Gram matrices."""
    n = len(gram_x)
    k, m, one = gram_x.clone(), gram_y.clone(), torch.ones(n, dtype=gram_x.dtype)
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    inner = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (inner - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def slow_drift(x, y):
    x, y = (side.double() - side.double().mean(0) for side in (x, y))  # which changes nothing but the rounding
    kernel_x, kernel_y = x @ x.T, y @ y.T
    return 1 - hsic(kernel_x, kernel_y) / (hsic(kernel_x, kernel_x) * hsic(kernel_y, kernel_y)).sqrt()


def slow_overlap(x, y, directions=16):
    found = [torch.linalg.svd(side.double() - side.double().mean(0), full_matrices=False) for side in (x, y)]
    ranks = [min(directions, int((1e-9 * side.S[0] < side.S).sum())) for side in found]
    u, v = (side.Vh[:rank] for side, rank in zip(found, ranks, strict=True))
    return (u @ v.T).square().sum() / max(ranks)


def slow_cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1).mean()


def tokens(n, d, *, seed=0, mean=0.0, dtype=torch.float64):
    """Tokens of unequal lengths, whose spectrum decays, some way from each other, with a common mean."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales
    y = x @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64) + 3 * torch.eye(d)).Q
    y = y + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64) * scales
    return (x + mean).to(dtype), (y + 2 * mean).to(dtype)


SHAPES = [(6, 40), (60, 40), (40, 60), (200, 20), (33, 32), (32, 32)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"),
    [(torch.float64, 1.0, 1e-9), (torch.float32, 0.0, 1e-5), (torch.float32, 300.0, 1e-3)],
)
def test_against_the_definitions(n, d, dtype, mean, tolerance):
    x, y = tokens(n, d, mean=mean, dtype=dtype)
    found = compare_tokens(x, y, torch.ones(n, dtype=torch.bool))
    expected = {
        "drift": slow_drift(x, y),
        "subspace_overlap": slow_overlap(x, y),
        "token_cosine": slow_cosine(x, y),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"count": n, **{name: value.item() for name, value in expected.items()}}, abs=tolerance
    )
    assert subspace_overlap(x, y).item() == pytest.approx(expected["subspace_overlap"].item(), abs=tolerance)
    assert subspace_overlap(x, y, directions=3).item() == pytest.approx(slow_overlap(x, y, 3).item(), abs=tolerance)
    assert token_cosine(x, y).item() == pytest.approx(expected["token_cosine"].item(), abs=tolerance)
    assert debiased_cka(x, y).item() == pytest.approx(1 - expected["drift"].item(), abs=tolerance)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_tokens_that_do_not_count_or_are_not_finite_are_as_if_they_were_not_there(n, d):
    x, y = tokens(n + 20, d, mean=1.0)
    counts = torch.ones(n + 20, dtype=torch.bool)
    counts[::2][:10] = False
    left = counts.clone()
    x[1], y[3], x[0] = torch.nan, torch.inf, 1e6
    left[[1, 3]] = False
    left[5:13:2] = counts[5:13:2] = False
    counts[-4:] = left[-4:] = False
    found = compare_tokens(x, y, counts)
    alone = compare_tokens(x[left], y[left], torch.ones(int(left.sum()), dtype=torch.bool))
    assert found["count"] == alone["count"] == n
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in alone.items()}, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_has_moved_at_the_start(n, d, dtype):
    x, _ = tokens(n, d, mean=3.0, dtype=dtype)
    found = compare_tokens(x, x.clone(), torch.ones(n, dtype=torch.bool))
    assert {name: found[name].item() for name in ("drift", "subspace_overlap", "token_cosine")} == pytest.approx(
        {"drift": 0, "subspace_overlap": 1, "token_cosine": 1}, abs=2e-6
    )


def test_a_rotation_is_seen_by_two_of_three_and_the_long_token_does_not_hide_what_moved():
    x, _ = tokens(300, 40)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    found = compare_tokens(x, 3 * x @ rotation + 1, torch.ones(300, dtype=torch.bool))
    assert found["drift"].item() == pytest.approx(0, abs=1e-9)
    assert found["subspace_overlap"] < 0.7
    assert found["token_cosine"] < 0.5
    # One token is nearly all of the diagonal of the Gram matrix.
    long = x.clone()
    long[7] *= 1000
    y = long + tokens(300, 40, seed=3)[0]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        found = compare_tokens(long.to(dtype), y.to(dtype), torch.ones(300, dtype=torch.bool))
        assert found["drift"].item() == pytest.approx(slow_drift(long, y).item(), abs=tolerance)


@pytest.mark.parametrize("n", [30, 10])
def test_directions_without_variance_are_not_shared(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 20, generator=generator)
    low = x.clone()
    low[:, 3:] = 1.0  # of rank 3
    assert subspace_overlap(low, low).item() == pytest.approx(1, abs=1e-5)
    most = min(16, n - 1)
    assert subspace_overlap(low, x) <= 3 / most + 1e-6
    assert subspace_overlap(x, low).item() == pytest.approx(subspace_overlap(low, x).item(), abs=1e-6)
    assert subspace_overlap(torch.ones(n, 20), torch.ones(n, 20)).isnan()


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_too_few_tokens(n):
    x, y = tokens(40, 8)
    found = compare_tokens(x, y, torch.arange(40) < n)
    assert found["count"] == n
    assert found["drift"].isnan() == (n < 4)
    assert found["subspace_overlap"].isnan() == (n < 2)
    assert found["token_cosine"].isnan() == (n < 1)


def test_zero_tokens_have_no_direction():
    x, y = tokens(8, 4)
    zero = y.clone()
    zero[2] = 0
    left = torch.arange(8) != 2
    assert token_cosine(x, zero).item() == pytest.approx(token_cosine(x[left], y[left]).item())


def test_arguments():
    x, y = tokens(8, 4)
    with pytest.raises(ValueError, match=r"as many features as `x`, \(8, 4\), got \(8, 3\)"):
        subspace_overlap(x, y[:, :3])
    with pytest.raises(ValueError, match="`directions` must be at least 1, got 0"):
        subspace_overlap(x, y, directions=0)
    with pytest.raises(TypeError, match="`directions` must be an int, got float"):
        subspace_overlap(x, y, directions=2.0)
    with pytest.raises(ValueError, match="`y` must have as many rows"):
        token_cosine(x, y[:3])


@pytest.mark.parametrize(("n", "d"), [(700, 660), (660, 1000)])
def test_the_directions_of_large_sides_are_those_of_the_decomposition(n, d):
    x, y = tokens(n, d, mean=3.0, dtype=torch.float32)
    assert subspace_overlap(x, y).item() == pytest.approx(slow_overlap(x, y).item(), abs=1e-4)
    low = x[:, :5].double() @ torch.randn(5, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert subspace_overlap(low.float(), y).item() == pytest.approx(slow_overlap(low, y).item(), abs=1e-4)
    constant = torch.ones(n, d)
    assert subspace_overlap(x, constant).item() == 0
    assert subspace_overlap(constant, constant).isnan()
