"""What unrelated rows give, and how far matching rows are from it: written out, in closed form, and over many draws."""

from __future__ import annotations

import functools
import math
import random
from itertools import permutations

import pytest
import torch

from matent_callbacks.functional import (
    debiased_cka,
    linear_cka,
    matrix_mutual_information,
    modality_gap,
    mutual_knn,
    pairing_z_score,
)

PERMUTED = [linear_cka, debiased_cka, functools.partial(mutual_knn, k=3)]
NAMES = ["linear_cka", "debiased_cka", "mutual_knn"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def related(n, d1, d2, *, seed=0, noise=0.3):
    """Pairs that share a linear signal."""
    x = normal(n, d1, seed=seed) * torch.linspace(0.5, 2, d1, dtype=torch.float64) + 1
    return x, x @ normal(d1, d2, seed=seed + 1) + noise * normal(n, d2, seed=seed + 2) - 2


def orthogonal(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def inner_products(x):
    return [[sum(u * v for u, v in zip(a, b, strict=True)) for b in x.tolist()] for a in x.tolist()]


def u_statistic(x, y):
    """Unbiased HSIC as the mean of the kernel of Song et al. (2012), equation 5, over all four different rows."""
    k, l = inner_products(x), inner_products(y)  # noqa: E741
    terms = [k[i][j] * (l[i][j] + l[q][r] - 2 * l[i][q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return sum(terms) / len(terms)


def slow_debiased_cka(x, y):
    return u_statistic(x, y) / math.sqrt(u_statistic(x, x) * u_statistic(y, y))


def slow_z_score(measure, x, y, orders):
    values = [float(measure(x, y[order])) for order in orders]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return (float(measure(x, y)) - mean) / deviation


@pytest.mark.parametrize(("n", "d1", "d2"), [(4, 3, 2), (6, 1, 4), (9, 2, 3), (10, 20, 15)])
def test_debiased_cka_is_the_u_statistic_written_out(n, d1, d2):
    x, y = related(n, d1, d2, seed=n, noise=2.0)
    expected = slow_debiased_cka(x, y)
    assert debiased_cka(x, y).item() == pytest.approx(expected, abs=1e-12)
    assert debiased_cka(x.float(), y.float()).item() == pytest.approx(expected, abs=1e-5)


def test_debiased_cka_of_identical_turned_scaled_and_shifted_rows():
    x, y = related(30, 6, 9, noise=3.0)
    assert debiased_cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert debiased_cka(x, 5 * x @ orthogonal(6) + normal(1, 6)).item() == pytest.approx(1, abs=1e-12)
    moved = 0.01 * y @ orthogonal(9) + 1e3
    assert debiased_cka(x, moved).item() == pytest.approx(debiased_cka(x, y).item(), abs=1e-9)
    assert debiased_cka(y, x).item() == pytest.approx(debiased_cka(x, y).item(), abs=1e-12)
    order = torch.randperm(30, generator=generator(0))
    assert debiased_cka(x[order], y[order]).item() == pytest.approx(debiased_cka(x, y).item(), abs=1e-12)
    assert debiased_cka(x, y[order]).item() < debiased_cka(x, y).item() - 0.3
    # Two groups that never agree: as far from chance on the other side as n rows can be.
    groups = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert debiased_cka(groups, groups[[0, 2, 1, 3]]).item() == pytest.approx(-0.5)


def test_debiased_cka_is_zero_on_average_where_linear_cka_is_nearly_one():
    x, y = normal(5, 40), normal(5, 30, seed=1)
    values = [debiased_cka(x, y[list(order)]).item() for order in permutations(range(5))]
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-12)
    assert linear_cka(x, y).item() > 0.8
    for n, d in [(8, 200), (64, 24), (300, 5)]:
        draws = [debiased_cka(normal(n, d, seed=2 * s), normal(n, d, seed=2 * s + 1)).item() for s in range(300)]
        mean, deviation = sum(draws) / 300, torch.tensor(draws).std().item()
        assert abs(mean) < 4 * deviation / math.sqrt(300)
        assert min(draws) < 0 < max(draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_debiased_cka_without_structure(dtype):
    for n in (4, 5, 30, 200):
        x = normal(n, 4).to(dtype)
        # Constant, a regular simplex, and one row away from the rest: no row is nearer to one than to another.
        outlier = torch.zeros(n, 3, dtype=dtype)
        outlier[0] = 1
        for empty in (torch.full((n, 3), 0.1, dtype=dtype), 7 * torch.eye(n, dtype=dtype) + 3, outlier):
            assert debiased_cka(x, empty).isnan()
            assert debiased_cka(empty, x).isnan()
            assert pairing_z_score(debiased_cka, x, empty).isnan()


def test_debiased_cka_needs_four_pairs():
    x, y = related(6, 3, 3)
    for n in (2, 3):
        with pytest.raises(ValueError, match=f"`x` must have at least 4 rows, got {n}"):
            debiased_cka(x[:n], y[:n])
    bad = x.clone()
    bad[2, 1], bad[5, 0] = math.nan, math.inf
    keep = [0, 1, 3, 4]
    assert debiased_cka(bad, y).item() == debiased_cka(x[keep], y[keep]).item()
    bad[0] = math.nan
    assert debiased_cka(bad, y).isnan()


@pytest.mark.parametrize("measure", PERMUTED, ids=NAMES)
@pytest.mark.parametrize(("n", "d1", "d2"), [(64, 24, 24), (16, 200, 100)])
def test_z_of_unrelated_rows_is_0_with_deviation_1(measure, n, d1, d2):
    draws = torch.stack(
        [pairing_z_score(measure, normal(n, d1, seed=2 * s), normal(n, d2, seed=2 * s + 1)) for s in range(200)]
    )
    assert draws.mean().item() == pytest.approx(0, abs=0.2)
    assert draws.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("measure", [*PERMUTED, matrix_mutual_information], ids=[*NAMES, "mutual_information"])
def test_z_is_that_of_a_slow_loop(measure):
    x, y = related(20, 5, 4, noise=6.0)
    orders = torch.rand(50, 20, generator=generator(7)).argsort(-1)
    expected = slow_z_score(measure, x, y, orders)
    assert abs(expected) > 1
    found = pairing_z_score(measure, x, y, permutations=50, generator=generator(7))
    assert found.item() == pytest.approx(expected, abs=1e-9)
    assert found.dtype == torch.float64
    # A function that is not known is called for each pairing; a number will do.
    called = []
    plain = pairing_z_score(
        lambda a, b: called.append(1) or measure(a, b).item(), x, y, permutations=50, generator=generator(7)
    )
    assert plain.item() == pytest.approx(expected, abs=1e-9)
    assert len(called) == 51
    narrow = pairing_z_score(measure, x.float(), y.float(), permutations=50, generator=generator(7))
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("measure", PERMUTED, ids=NAMES)
def test_known_measures_are_computed_once_and_only_permuted(measure, monkeypatch):
    from matent_callbacks.functional import pairs

    products = []
    original = pairs.centred_features if measure in (linear_cka, debiased_cka) else pairs.is_neighbour
    name = original.__name__

    def counted(*args, **kwargs):
        products.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(pairs, name, counted)
    pairing_z_score(measure, normal(20, 3), normal(20, 4, seed=1), permutations=100)
    assert 0 < len(products) <= 4


def test_many_pairs_in_small_portions():
    x, y = related(400, 6, 6, noise=40.0)
    found = pairing_z_score(linear_cka, x, y, permutations=5, generator=generator(3))
    orders = torch.rand(5, 400, generator=generator(3)).argsort(-1)
    assert found.item() == pytest.approx(slow_z_score(linear_cka, x, y, orders), abs=1e-8)


@pytest.mark.parametrize("measure", PERMUTED, ids=NAMES)
def test_matching_rows_are_far_above_chance_and_permuted_ones_are_not(measure):
    x, y = related(64, 8, 8, noise=1.0)
    order = torch.randperm(64, generator=generator(5))
    matching = pairing_z_score(measure, x, y).item()
    assert matching > 10
    assert pairing_z_score(measure, x, x).item() > matching
    assert abs(pairing_z_score(measure, x, y[order]).item()) < 4
    turned = pairing_z_score(measure, x, 3 * y @ orthogonal(8))
    assert turned.item() == pytest.approx(matching, abs=1e-6)


def test_the_same_input_gives_the_same_number_and_nobodys_random_numbers_move():
    x, y = related(24, 5, 5, noise=4.0)
    torch.manual_seed(11)
    random.seed(11)
    before = torch.get_rng_state(), random.getstate()
    values = {pairing_z_score(measure, x, y).item() for _ in range(3) for measure in (linear_cka, debiased_cka)}
    torch.manual_seed(99)
    values |= {pairing_z_score(measure, x, y).item() for measure in (linear_cka, debiased_cka)}
    assert len(values) == 2
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), before[0])
    pairing_z_score(lambda a, b: (a * b).sum(), x, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    own = generator(1)
    first, second = (pairing_z_score(linear_cka, x, y, generator=own) for _ in range(2))
    assert first != second


def test_z_is_not_defined_where_the_pairing_does_not_matter():
    x, y = normal(20, 4).float(), normal(20, 4, seed=1).float()
    assert pairing_z_score(modality_gap, x, y).isnan()
    assert pairing_z_score(linear_cka, x, torch.full((20, 3), 0.1)).isnan()
    # All others are neighbours; two pairs always agree.
    assert pairing_z_score(mutual_knn, x[:11], y[:11]).isnan()
    assert pairing_z_score(linear_cka, x[:2], y[:2]).isnan()


def test_pairs_with_nan_are_left_out_of_every_pairing():
    x, y = related(20, 4, 4, noise=3.0)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[3, 1], bad_y[7, 2] = math.nan, math.inf
    keep = [i for i in range(20) if i not in (3, 7)]
    for measure in (*PERMUTED, matrix_mutual_information):
        assert pairing_z_score(measure, bad_x, bad_y).item() == pairing_z_score(measure, x[keep], y[keep]).item()
    bad_x[:17] = math.nan
    assert pairing_z_score(debiased_cka, bad_x, y).isnan()
    assert pairing_z_score(mutual_knn, bad_x, y).isnan()
    bad_x[:19] = math.nan
    assert pairing_z_score(matrix_mutual_information, bad_x, y).isnan()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("cka",), {}, TypeError, "`measure` must be a function of paired rows, got str"),
        ((lambda a, b: a @ b.T,), {}, TypeError, r"`measure` must give a number or a tensor \(\), got a tensor"),
        ((lambda a, b: "high",), {}, TypeError, r"`measure` must give a number or a tensor \(\), got str"),
        ((linear_cka,), {"permutations": 1}, ValueError, "`permutations` must be at least 2, got 1"),
        ((linear_cka,), {"permutations": 20.0}, TypeError, "`permutations` must be an int, got float"),
        ((linear_cka,), {"permutations": True}, TypeError, "`permutations` must be an int, got bool"),
        ((linear_cka,), {"generator": 3}, TypeError, "`generator` must be a torch.Generator or None, got int"),
        ((functools.partial(mutual_knn, k=12),), {}, ValueError, r"`x` must have at least k \+ 1 = 13 rows, got 12"),
        ((functools.partial(mutual_knn, k=0),), {}, ValueError, "`k` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    x = normal(12, 3)
    with pytest.raises(error, match=message):
        pairing_z_score(*arguments, x, x, **options)
    with pytest.raises(ValueError, match="`y` must have as many rows as `x`, 12, got 11"):
        pairing_z_score(linear_cka, x, x[:11])
