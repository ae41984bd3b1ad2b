"""The power law against scipy's own least squares, its intervals against what they promise, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import f

from matent_callbacks.scaling_law import PowerLaw, fit_power_laws

SIZES = np.geomspace(1e5, 6e6, 8)


def both(x, y) -> tuple[PowerLaw, PowerLaw]:
    """The form without c, then the one with it."""
    fits = fit_power_laws(x, y)
    return tuple(sorted(fits, key=lambda fit: fit.c is not None))


def noisy(a: float, b: float, c: float, seed: int, deviation: float = 0.004):
    return a * SIZES**-b + c + np.random.default_rng(seed).normal(0, deviation, len(SIZES))


def test_estimates_are_those_of_least_squares():
    for seed in range(5):
        y = noisy(3, 0.25, 0.4, seed)
        without, with_c = both(SIZES, y)
        (a, b, c), _ = curve_fit(lambda x, a, b, c: a * x**-b + c, SIZES, y, p0=(3, 0.25, 0.4), maxfev=20000)
        assert (with_c.a.value, with_c.b.value, with_c.c.value) == pytest.approx((a, b, c), rel=1e-4)
        assert with_c.deviation == pytest.approx(np.sqrt(((a * SIZES**-b + c - y) ** 2).sum() / (len(y) - 3)))
        (a, b), _ = curve_fit(lambda x, a, b: a * x**-b, SIZES, y, p0=(1, 0.1))
        assert (without.a.value, without.b.value) == pytest.approx((a, b), rel=1e-4)
        assert without(1e7) == pytest.approx(a * 1e7**-b, rel=1e-4)


@pytest.mark.parametrize("limit", ["low", "high"])
def test_limits_are_where_the_profile_likelihood_says(limit: str):
    y = noisy(3, 0.25, 0.4, 0)
    _, fit = both(SIZES, y)
    freedom = len(y) - 3
    allowed = fit.deviation**2 * freedom * (1 + f.ppf(0.95, 1, freedom) / freedom)

    def least(model, start):
        found, _ = curve_fit(model, SIZES, y, p0=start, maxfev=20000, ftol=1e-13, xtol=1e-13)
        return ((model(SIZES, *found) - y) ** 2).sum()

    a, b, c = (getattr(estimate, limit) for estimate in (fit.a, fit.b, fit.c))
    assert least(lambda x, a, c: a * x**-b + c, (3, 0.4)) == pytest.approx(allowed, rel=1e-4)
    assert least(lambda x, b, c: a * x**-b + c, (fit.b.value, 0.4)) == pytest.approx(allowed, rel=1e-3)
    assert least(lambda x, a, b: a * x**-b + c, (3, fit.b.value)) == pytest.approx(allowed, rel=1e-3)
    end = fit.band([1e7])[0][limit == "high"]  # a curve that is held at 1e7
    held = least(lambda x, above, b: above * (x / 1e7) ** -b + end - above, (fit(1e7) - fit.c.value, fit.b.value))
    assert held == pytest.approx(allowed, rel=1e-3)


def test_95_percent_intervals_hold_the_truth_in_95_percent():
    held = np.zeros(5)
    trials = 120
    for seed in range(trials):
        _, fit = both(SIZES, noisy(3, 0.25, 0.4, seed))
        low, high = fit.band([1e7])[0]
        held[:3] += [e.low <= true <= e.high for e, true in ((fit.a, 3), (fit.b, 0.25), (fit.c, 0.4))]
        held[3] += low <= 3 * 1e7**-0.25 + 0.4 <= high
        without, _ = both(SIZES, noisy(2, 0.1, 0, seed))
        held[4] += without.b.low <= 0.1 <= without.b.high
    assert (abs(held / trials - 0.95) <= 0.05).all(), held / trials  # 2.5 standard errors


def test_form_is_chosen_by_the_criterion():
    for seed in range(5):
        best, other = fit_power_laws(SIZES, noisy(3, 0.25, 0.4, seed, 0.001))
        assert best.c is not None
        assert best.aicc < other.aicc
        assert fit_power_laws(SIZES, noisy(2, 0.1, 0, seed))[0].c is None
    n, fit = len(SIZES), fit_power_laws(SIZES, noisy(2, 0.1, 0, 0))[0]
    likelihood = n * math.log(fit.deviation**2 * (n - 2) / n)
    assert fit.aicc == pytest.approx(likelihood + 2 * 3 + 2 * 3 * 4 / (n - 4))


def test_five_points_are_too_few_for_a_constant():
    (fit,) = fit_power_laws(SIZES[:5], 3 * SIZES[:5] ** -0.25 + 0.4)
    assert fit.c is None
    assert len(fit_power_laws(SIZES[:6], 3 * SIZES[:6] ** -0.25 + 0.4)) == 2


@pytest.mark.parametrize("c", [0, 0.3])
def test_exact_values_give_exact_parameters(c: float):
    best, _ = fit_power_laws(SIZES, 2 * SIZES**-0.1 + c)
    assert (best.a.value, best.b.value, best.c.value if best.c else 0) == pytest.approx((2, 0.1, c))
    assert best.b.high - best.b.low < 1e-6


def test_limits_that_the_points_do_not_set():
    (fit,) = fit_power_laws([1e5, 1e6, 1e7], [0.8, 0.6, 0.7])
    assert (fit.b.low, fit.b.high, fit.a.low, fit.a.high) == (0, math.inf, 0, math.inf)


def test_curves_within_the_limits_never_rise():
    y = np.array([0.536, 0.556, 0.567, 0.556, 0.514, 0.450])  # a hump, which a falling and a flat curve fit alike
    _, fit = both(SIZES[:6], y)
    allowed = fit.deviation**2 * 3 * (1 + f.ppf(0.95, 1, 3) / 3)
    flat = math.sqrt((allowed - ((y - y.mean()) ** 2).sum()) / 6)
    assert fit.c.high == pytest.approx(y.mean() + flat)
    assert fit.band([1e12])[0][1] == pytest.approx(y.mean() + flat)


def test_constant_is_never_negative():
    # Straight over log N, which a power law reaches only with c far below 0.
    without, with_c = both(SIZES, 1.5 - 0.08 * np.log(SIZES))
    assert with_c.c.value == with_c.c.low == 0
    assert with_c.b.value == pytest.approx(without.b.value, rel=1e-5)


def test_limits_hold_where_the_constant_is_at_zero():
    y = noisy(2, 0.1, 0, 2)
    _, fit = both(SIZES, y)
    assert fit.c.low == 0
    allowed = fit.deviation**2 * (len(y) - 3) * (1 + f.ppf(0.95, 1, len(y) - 3) / (len(y) - 3))
    b, c = (grid.reshape(-1, 1) for grid in np.meshgrid(np.linspace(0.05, 0.3, 700), np.linspace(0, 0.5, 700)))
    powers = SIZES**-b
    squares = (powers**2).sum(1, keepdims=True)
    a = (powers * (y - c)).sum(1, keepdims=True) / squares
    left = allowed - ((a * powers + c - y) ** 2).sum(1, keepdims=True)
    width, inside = np.sqrt(np.maximum(left, 0) / squares), left >= 0
    assert fit.a.high == pytest.approx((a + width)[inside].max(), rel=0.01)
    assert fit.a.low == pytest.approx((a - width)[inside].min(), rel=0.01)
    assert (fit.b.low, fit.b.high) == pytest.approx((b[inside].min(), b[inside].max()), rel=0.01)
    assert fit.c.high == pytest.approx(c[inside].max(), rel=0.01)
    curve, slack = a * 1e8**-b + c, width * 1e8**-b
    expected = ((curve - slack)[inside].min(), (curve + slack)[inside].max())
    assert fit.band([1e8])[0] == pytest.approx(expected, rel=0.01)


def test_order_and_unit_of_sizes_do_not_matter():
    y = noisy(3, 0.25, 0.4, 1)
    plain, mixed = fit_power_laws(SIZES, y)[0], fit_power_laws(SIZES[::-1] / 1e6, y[::-1])[0]
    assert (mixed.b.value, mixed.b.low, mixed.b.high) == pytest.approx(
        (plain.b.value, plain.b.low, plain.b.high), rel=1e-5
    )
    assert mixed.a.value == pytest.approx(plain.a.value * 1e6**-plain.b.value, rel=1e-4)
    assert mixed.band([1])[0] == pytest.approx(plain.band([1e6])[0], rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [2, 1], "at least three different sizes, got 2"),
        ([1, 1, 2, 2], [3, 4, 2, 1], "at least three different sizes, got 2"),
        ([1, 2, 3], [1, 2, 3], r"do not fall: .*S = \+3"),
        ([1, 2, 3], [1, 1, 1], r"do not fall: .*S = \+0"),
        ([1, 2, 0], [3, 2, 1], "`x` must be positive finite numbers, got 0"),
        ([1, 2, 3], [3, 2, -1], "`y` must be finite numbers of at least 0, got -1"),
        ([1, 2, 3], [3, 2, math.nan], "`y` must be finite .* got nan"),
        ([1, 2, 3], [3, 2], "equally long, got 3 and 2"),
    ],
)
def test_refusals(x: list[float], y: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        fit_power_laws(x, y)
