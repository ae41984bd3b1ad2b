"""Measures of two representations against slow loops, closed forms, exact expectations and bad input."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from matent_callbacks.functional import (
    debiased_cka,
    linear_cka,
    matrix_entropy,
    matrix_mutual_information,
    modality_gap,
    mutual_knn,
)
from tests.functional.reduced import reduced_matmul

PAIRED = [matrix_mutual_information, linear_cka, debiased_cka, mutual_knn, modality_gap]


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


def classical(counts):
    """Pairs of +-unit vectors, one per outcome: their Gram matrices have classical probabilities as eigenvalues."""
    rows, columns = len(counts), len(counts[0])
    outcomes = [(i, j) for i in range(rows) for j in range(columns) for _ in range(counts[i][j])]
    signs = [(s, t) for s in (1, -1) for t in (1, -1)]  # all four, so that both means are zero
    x = torch.stack([s * torch.eye(rows)[i] for i, _ in outcomes for s, _ in signs])
    y = torch.stack([t * torch.eye(columns)[j] for _, j in outcomes for _, t in signs])
    return x.double(), y.double()


# The definitions again, one number at a time.


def slow_dot(a, b):
    return sum(u * v for u, v in zip(a, b, strict=True))


def slow_centred(x):
    rows = x.double().tolist()
    means = [sum(row[j] for row in rows) / len(rows) for j in range(len(rows[0]))]
    return [[v - m for v, m in zip(row, means, strict=True)] for row in rows]


def slow_unit(rows):
    # Sums of a few thirds or tenths leave 1e-17 where the mean itself is meant.
    norms = [math.sqrt(slow_dot(row, row)) for row in rows]
    return [[v / norm for v in row] if norm > 1e-12 else None for row, norm in zip(rows, norms, strict=True)]


def slow_kernel(x):
    def similarity(a, b):
        if a is None or b is None:
            return 1.0 if a is b else 0.0
        return slow_dot(a, b)

    rows = slow_unit(slow_centred(x))
    return [[similarity(a, b) for b in rows] for a in rows]


def slow_renyi(matrix, alpha):
    trace = sum(row[i] for i, row in enumerate(matrix))
    values = torch.linalg.eigvalsh(torch.tensor(matrix, dtype=torch.float64) / trace).tolist()
    values = [v for v in values if v > 1e-14]
    if alpha == 1:
        return -sum(v * math.log(v) for v in values)
    if alpha == math.inf:
        return -math.log(max(values))
    return math.log(sum(v**alpha for v in values)) / (1 - alpha)


def slow_mutual_information(x, y, alpha=1.0):
    a, b = slow_kernel(x), slow_kernel(y)
    joint = [[u * v for u, v in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]
    return slow_renyi(a, alpha) + slow_renyi(b, alpha) - slow_renyi(joint, alpha)


def slow_cka(x, y):
    x, y = slow_centred(x), slow_centred(y)

    def cross(a, b):
        columns_a, columns_b = list(zip(*a, strict=True)), list(zip(*b, strict=True))
        return sum(slow_dot(p, q) ** 2 for p in columns_a for q in columns_b)

    return cross(x, y) / math.sqrt(cross(x, x) * cross(y, y))


def slow_mutual_knn(x, y, k):
    def neighbours(x):
        rows = slow_unit(x.double().tolist())
        order = [
            sorted((j for j in range(len(rows)) if j != i), key=lambda j, a=a: -slow_dot(a, rows[j]))
            for i, a in enumerate(rows)
        ]
        return [set(others[:k]) for others in order]

    shared = [len(a & b) for a, b in zip(neighbours(x), neighbours(y), strict=True)]
    return sum(shared) / (k * len(shared))


def slow_gap(x, y):
    x, y = slow_unit(x.double().tolist()), slow_unit(y.double().tolist())
    columns = zip(zip(*x, strict=True), zip(*y, strict=True), strict=True)
    return math.sqrt(sum((sum(p) / len(p) - sum(q) / len(q)) ** 2 for p, q in columns))


# More features than pairs and fewer: each function takes another route.
SIZES = [(2, 3, 4), (12, 30, 20), (25, 6, 3), (40, 2, 5), (12, 4, 30)]


@pytest.mark.parametrize(("n", "d1", "d2"), SIZES)
def test_every_measure_is_its_definition(n, d1, d2):
    x, y = related(n, d1, d2, seed=n + d1, noise=1.0)
    for alpha in (0.5, 1.0, 2.0, 3.0, math.inf):
        expected = slow_mutual_information(x, y, alpha)
        # A root magnifies the 1e-16 that is left of eigenvalues which are zero.
        accuracy = 1e-9 if alpha >= 1 else 1e-6
        assert matrix_mutual_information(x, y, alpha=alpha).item() == pytest.approx(expected, abs=accuracy)
    assert linear_cka(x, y).item() == pytest.approx(slow_cka(x, y), abs=1e-12)
    for k in {1, min(3, n - 1), n - 1}:
        assert mutual_knn(x, y, k=k).item() == pytest.approx(slow_mutual_knn(x, y, k), abs=1e-12)
    d = min(d1, d2)
    assert modality_gap(x[:, :d], y[:, :d]).item() == pytest.approx(slow_gap(x[:, :d], y[:, :d]), abs=1e-12)
    assert matrix_mutual_information(x.float(), y.float()).item() == pytest.approx(
        slow_mutual_information(x.float(), y.float()), abs=1e-5
    )
    assert linear_cka(x.float(), y.float()).item() == pytest.approx(slow_cka(x, y), abs=1e-5)
    assert modality_gap(x[:, :d].float(), y[:, :d].float()).item() == pytest.approx(
        slow_gap(x[:, :d], y[:, :d]), abs=1e-6
    )


def test_identical_inputs():
    x = normal(30, 7)
    assert linear_cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert mutual_knn(x, x).item() == 1
    assert modality_gap(x, x).item() == 0
    assert linear_cka(x.float(), x.float()).item() <= 1


def test_orthogonal_maps_scaling_and_shifts():
    x, y = related(40, 6, 9)
    moved = 0.01 * y @ orthogonal(9) + normal(1, 9)
    assert linear_cka(x, moved).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-12)
    for alpha in (1.0, 2.0):
        expected = matrix_mutual_information(x, y, alpha=alpha).item()
        assert matrix_mutual_information(x, moved, alpha=alpha).item() == pytest.approx(expected, abs=1e-10)
    # Cosines know the origin, so neighbours and the gap get no shift.
    assert mutual_knn(x, 100 * y @ orthogonal(9)).item() == mutual_knn(x, y).item()
    turn = orthogonal(6)
    z = normal(40, 6, seed=5)
    assert modality_gap(3 * x @ turn, 0.2 * z @ turn).item() == pytest.approx(modality_gap(x, z).item(), abs=1e-12)
    # Other maps do change them.
    assert abs(linear_cka(x, y * torch.linspace(0.1, 3, 9)).item() - linear_cka(x, y).item()) > 0.01


def test_permuted_pairs_lower_all_but_the_gap():
    x, y = related(80, 5, 5)
    order = torch.randperm(80, generator=generator(3))
    for measure, margin in [(matrix_mutual_information, 0.2), (linear_cka, 0.3), (mutual_knn, 0.2)]:
        assert measure(x, y[order]).item() < measure(x, y).item() - margin
        assert measure(x[order], y[order]).item() == pytest.approx(measure(x, y).item(), abs=1e-12)
    assert modality_gap(x, y[order]).item() == pytest.approx(modality_gap(x, y).item(), abs=1e-12)


def test_expectation_over_all_permutations():
    n, k = 5, 2
    x, y = normal(n, 2), normal(n, 3, seed=1)
    orders = [list(order) for order in permutations(range(n))]

    def mean(measure, **arguments):
        return sum(measure(x, y[order], **arguments).item() for order in orders) / len(orders)

    # A random set of k out of n - 1 meets any other in k * k / (n - 1).
    assert mean(mutual_knn, k=k) == pytest.approx(k / (n - 1), abs=1e-12)
    # For centred K and L: E tr(K P L P') = tr K tr L / (n - 1).
    participation = [c.trace() ** 2 / c.square().sum() for c in (torch.cov(x.T), torch.cov(y.T))]
    expected = math.sqrt(participation[0] * participation[1]) / (n - 1)
    assert mean(linear_cka) == pytest.approx(expected, abs=1e-12)
    # I_1 = D(joint, product) <= log tr(joint^2 product^-1), whose mean under the log is 1 + (rx-1)(ry-1)/(n-1).
    assert 0 < mean(matrix_mutual_information) <= math.log(1 + (2 - 1) * (3 - 1) / (n - 1))


def test_independent_inputs_are_near_zero():
    n, d1, d2, k = 1000, 3, 4, 10
    x, y = normal(n, d1), normal(n, d2, seed=1)
    # Markov: a non-negative value is 20 times its mean in 1 of 20 seeds at most; the means are those from above.
    assert matrix_mutual_information(x, y).item() <= 20 * math.log(1 + (d1 - 1) * (d2 - 1) / (n - 1)) <= 0.12
    assert linear_cka(x, y).item() <= 20 * math.sqrt(d1 * d2) / (n - 1) <= 0.07
    # Chebyshev, 6 standard deviations: the mean of overlaps varies no more than one of them, and one is hypergeometric.
    rate = k / (n - 1)
    orders = [torch.randperm(n, generator=generator(seed)) for seed in range(10)]
    overlap = sum(mutual_knn(x, y[order], k=k).item() for order in orders) / len(orders)
    assert abs(overlap - rate) <= 6 * math.sqrt(rate * (1 - rate) / k / len(orders)) <= 0.06


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_mutual_information_with_itself_is_that_of_the_hadamard_square(alpha):
    x = normal(20, 5)
    z = x - x.mean(0)
    z = z / z.norm(dim=1, keepdim=True)
    squared = (z @ z.T / 20).square() * 20
    values = torch.linalg.eigvalsh(squared).clamp(min=0)
    joint = torch.special.entr(values).sum() if alpha == 1 else values.pow(alpha).sum().log() / (1 - alpha)
    expected = 2 * matrix_entropy(x, alpha=alpha) - joint
    assert matrix_mutual_information(x, x, alpha=alpha).item() == pytest.approx(expected.item(), abs=1e-9)


def test_mutual_information_reaches_its_bound_with_labels_and_not_with_itself():
    z = normal(9, 4)
    x = torch.cat([z, -z])
    labels = torch.cat([torch.eye(9), -torch.eye(9)]).double()
    assert matrix_mutual_information(x, labels).item() == pytest.approx(matrix_entropy(x).item(), abs=1e-12)
    assert matrix_mutual_information(x, x).item() < matrix_entropy(x).item() - 0.1
    assert matrix_mutual_information(labels, labels).item() == pytest.approx(math.log(9), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("counts", [[[2, 1], [1, 0]], [[2, 1], [7, 2]], [[1, 0], [0, 2]], [[2, 4, 2], [1, 2, 1]]])
def test_mutual_information_of_outcomes_is_the_classical_one(counts, alpha):
    def renyi(probabilities):
        p = torch.tensor(probabilities, dtype=torch.float64)
        p = p[p > 0] / p.sum()
        if alpha in (1, math.inf):
            return -(p * p.log()).sum().item() if alpha == 1 else -p.max().log().item()
        return p.pow(alpha).sum().log().item() / (1 - alpha)

    marginals = renyi([sum(row) for row in counts]) + renyi([sum(column) for column in zip(*counts, strict=True)])
    expected = marginals - renyi([count for row in counts for count in row])
    assert matrix_mutual_information(*classical(counts), alpha=alpha).item() == pytest.approx(expected, abs=1e-6)


def test_mutual_information_is_negative_for_some_pairs_unless_the_order_is_1():
    pairs = classical([[2, 1], [1, 0]])
    assert matrix_mutual_information(*pairs, alpha=2).item() == pytest.approx(math.log(0.375 / 0.625**2))
    assert matrix_mutual_information(*pairs, alpha=2).item() < -0.04
    assert matrix_mutual_information(*pairs, alpha=1).item() > 0.08
    assert matrix_mutual_information(*classical([[2, 1], [7, 2]]), alpha=0.5).item() < -0.003


def test_range_of_mutual_information():
    for seed in range(60):
        n, d1, d2 = (int(torch.randint(2, 9, (), generator=generator(seed + i))) for i in range(3))
        x, y = normal(n, d1, seed=seed), normal(n, d2, seed=seed + 1)
        if seed % 3 == 0:
            y = x
        if seed % 5 == 0:  # two rows that equal the mean, exactly, as the others are integers
            x = torch.cat([(3 * x).round(), -(3 * x).round(), torch.zeros(2, x.shape[1])])
            y = normal(2 * n + 2, y.shape[1], seed=seed + 2)
        assert matrix_mutual_information(x, y).item() >= -1e-12
        for alpha in (0.5, 1.0, 2.0, 4.0):
            information = matrix_mutual_information(x, y, alpha=alpha).item()
            # The joint entropy of n pairs is log n at most.
            a, b = slow_renyi(slow_kernel(x), alpha), slow_renyi(slow_kernel(y), alpha)
            assert a + b - math.log(len(x)) - 1e-6 <= information <= min(a, b) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_sides(dtype):
    for n in (2, 3, 7, 30):
        x = normal(n, 4).to(dtype)
        constant = torch.full((n, 3), 0.1, dtype=dtype)  # 0.1 is rounded, so one pass of centring leaves crumbs
        for alpha in (1.0, 2.0, 3.0):
            assert matrix_mutual_information(x, constant, alpha=alpha).item() == pytest.approx(0, abs=1e-5)
            assert matrix_mutual_information(constant, constant, alpha=alpha).item() == pytest.approx(0, abs=1e-5)
        assert linear_cka(x, constant).isnan()
        assert linear_cka(constant, x).isnan()
        # One constant feature among others counts for nothing.
        padded = torch.cat([x, constant], dim=1)
        assert linear_cka(x, padded).item() == pytest.approx(1, abs=1e-5)
    assert modality_gap(torch.zeros(3, 2), torch.ones(3, 2)).item() == pytest.approx(1)


def test_rows_without_direction_share_one():
    # Two rows of four have a direction, the others equal the mean: two outcomes of probability 1/2.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert matrix_mutual_information(x, x).item() == pytest.approx(math.log(2), abs=1e-12)
    elsewhere = x[[0, 2, 1, 3]]
    assert matrix_mutual_information(x, elsewhere).item() == pytest.approx(0, abs=1e-12)
    y = normal(4, 3)
    assert matrix_mutual_information(x, y).item() == pytest.approx(slow_mutual_information(x, y), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_cka_of_tiny_and_huge_features(scale):
    x, y = (t.float() for t in related(30, 5, 4))
    assert linear_cka(scale * x, y / scale).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-5)


def test_pairs_with_nan_or_inf_are_left_out():
    x, y = related(20, 4, 4)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[3, 1], bad_x[7, 0], bad_y[7, 2], bad_y[11, 3] = math.nan, math.inf, math.nan, -math.inf
    keep = [i for i in range(20) if i not in (3, 7, 11)]
    for measure in PAIRED:
        assert measure(bad_x, bad_y).item() == measure(x[keep], y[keep]).item()
    bad_x[:19] = math.nan
    assert all(measure(bad_x, y, **({"k": 1} if measure is mutual_knn else {})).isnan() for measure in PAIRED)
    # Neighbours need one pair more than there are of them.
    bad_y[:7] = math.nan
    assert len(keep) - 6 == 11
    assert not mutual_knn(x, bad_y, k=10).isnan()
    assert mutual_knn(x, bad_y, k=11).isnan()


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_and_autocast_are_measured_in_float32(measure, dtype):
    x, y = (t.to(dtype) for t in related(40, 8, 8))
    copies = x.clone(), y.clone()
    expected = measure(x.float(), y.float())
    assert expected.dtype == torch.float32
    assert torch.equal(measure(x, y), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure(x, y), expected)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


@pytest.mark.parametrize("measure", PAIRED)
def test_float64_is_kept(measure):
    x, y = related(15, 3, 3)
    for pair in [(x, y), (x.float(), y), (x, y.float())]:
        assert measure(*pair).dtype == torch.float64
        assert measure(*pair).shape == ()
        exact = measure(pair[0].double(), pair[1].double())
        assert torch.equal(measure(*pair), exact)


def test_reduced_matmul_precision_is_set_aside_and_put_back():
    x, y = (t.float() for t in related(300, 64, 64))
    expected = [measure(x, y) for measure in PAIRED]
    with reduced_matmul():
        assert all(torch.equal(measure(x, y), value) for measure, value in zip(PAIRED, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], torch.randn(3, 4)), TypeError, r"`x` must be a torch.Tensor, got list"),
        ((torch.randn(3, 4), None), TypeError, r"`y` must be a torch.Tensor, got NoneType"),
        ((torch.ones(3, 4).long(), torch.randn(3, 4)), TypeError, r"`x` must be a floating point .* got torch.int64"),
        ((torch.randn(3, 4), torch.ones(3, 4).bool()), TypeError, r"`y` must be a floating point .* got torch.bool"),
        ((torch.randn(4), torch.randn(3, 4)), ValueError, r"`x` must have shape \(pairs, features\), got \(4,\)"),
        ((torch.randn(3, 4), torch.randn(3, 4, 1)), ValueError, r"`y` must have shape .* got \(3, 4, 1\)"),
        ((torch.randn(3, 0), torch.randn(3, 4)), ValueError, r"`x` must have at least one feature, got \(3, 0\)"),
        ((torch.randn(3, 4), torch.randn(5, 4)), ValueError, r"`y` must have as many rows as `x`, 3, got 5"),
        ((torch.randn(1, 4), torch.randn(1, 4)), ValueError, r"`x` must have at least 2 rows, got 1"),
        ((torch.randn(3, 4), torch.randn(3, 4, device="meta")), ValueError, r"`y` must be on .* `x`, cpu, got meta"),
    ],
)
@pytest.mark.parametrize("measure", PAIRED)
def test_bad_pairs_are_named(measure, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(*arguments)


def test_bad_options_are_named():
    x = torch.randn(10, 4)
    with pytest.raises(ValueError, match="`alpha` must be above 0, got 0"):
        matrix_mutual_information(x, x, alpha=0)
    with pytest.raises(ValueError, match=r"`x` must have at least k \+ 1 = 11 rows, got 10"):
        mutual_knn(x, x)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        mutual_knn(x, x, k=0)
    with pytest.raises(TypeError, match="`k` must be an int, got float"):
        mutual_knn(x, x, k=2.0)
    with pytest.raises(ValueError, match="`y` must have as many features as `x`, 4, got 3"):
        modality_gap(x, x[:, :3])
