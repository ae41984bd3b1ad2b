"""Fits how a quantity falls with the size of a model: H(N) = a N^-b + c, with confidence intervals.

Needs scipy: ``pip install 'matent-callbacks[cli]'``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f

__all__ = ["Estimate", "PowerLaw", "fit_power_laws"]

Array = NDArray[np.float64]

_CONFIDENCE = 0.95
_GRID = 2000


@dataclass(frozen=True)
class Estimate:
    """A parameter with its 95 % confidence interval; a limit that the points do not set is 0 or infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """A fitted H(N) = a N^-b + c, or a N^-b where ``c`` is None; what ``fit_power_laws`` returns.

    Attributes:
        a: The factor, in the unit of the values: what is above c at N = 1.
        b: The exponent.
        c: What remains however large N is, in the unit of the values.
        deviation: Residual standard deviation, in the unit of the values.
        aicc: Akaike's criterion with the correction for small samples; None with too few points to correct for.
    """

    a: Estimate
    b: Estimate
    c: Estimate | None
    deviation: float
    aicc: float | None
    _profile: _Profile = field(repr=False, compare=False)

    def __call__(self, x: float) -> float:
        """The value of the curve at size ``x``."""
        return float(self.a.value * x**-self.b.value + (self.c.value if self.c else 0.0))

    def band(self, x: Sequence[float]) -> list[tuple[float, float]]:
        """The 95 % confidence interval of the curve, not of further points, at each of the sizes ``x``."""
        return [self._profile.curve(size) for size in x]


def fit_power_laws(x: Sequence[float], y: Sequence[float]) -> tuple[PowerLaw, ...]:
    """Fit a N^-b, and a N^-b + c with c >= 0 where there are points enough, by least squares; the better one first.

    Better is the one with the lower AICc (Hurvich & Tsai 1989, doi:10.1093/biomet/76.2.297), which counts the noise as
    a parameter. It does not exist for the form with c below six points, so that form is not tried there.

    For each b the best a and c are a linear problem, so the fit is a search along b alone, which cannot end in a
    wrong minimum. The intervals are those of the profile likelihood (Bates & Watts 1988, chapter 6): all values with
    RSS <= RSS_min (1 + F(0.95; 1, n - p) / (n - p)). The noise is estimated from the residuals.

    Args:
        x: Sizes N (parameters, steps, tokens), positive; a size may occur more than once.
        y: Values H at these sizes, not negative.

    Returns:
        One or two fits.

    Raises:
        ValueError: If the lengths differ, a number is out of range, there are fewer than three different sizes, or
            the values do not fall: of the pairs of points, no more fall than rise (Kendall's S >= 0).

    Example:
        >>> from matent_callbacks.scaling_law import fit_power_laws
        >>> sizes = [1e5, 3e5, 1e6, 3e6, 1e7, 3e7]
        >>> noise = [0.001, -0.001, -0.001, 0.001, 0.001, -0.001]
        >>> best, other = fit_power_laws(sizes, [2 * size**-0.1 + e for size, e in zip(sizes, noise)])
        >>> best.c is None, round(best.b.value, 3), best.b.low < 0.1 < best.b.high
        (True, 0.1, True)
    """
    _check(x, y)
    fits = [_fit(x, y, constant) for constant in (False, True) if not constant or len(x) >= 6]
    return tuple(sorted(fits, key=lambda fit: math.inf if fit.aicc is None else fit.aicc))


def _check(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ValueError(f"`x` and `y` must be equally long, got {len(x)} and {len(y)} numbers.")
    if bad := [size for size in x if not 0 < size < math.inf]:
        raise ValueError(f"`x` must be positive finite numbers, got {bad[0]}.")
    if bad := [value for value in y if not 0 <= value < math.inf]:
        raise ValueError(f"`y` must be finite numbers of at least 0, got {bad[0]}.")
    if len(set(x)) < 3:
        raise ValueError(f"A power law needs at least three different sizes, got {len(set(x))}.")
    if (score := _score(x, y)) >= 0:
        raise ValueError(f"The values do not fall: no more pairs of points fall than rise (Kendall's S = {score:+d}).")


def _fit(x: Sequence[float], y: Sequence[float], constant: bool) -> PowerLaw:
    profile = _Profile(x, y, constant)
    n, parameters = len(x), 3 if constant else 2
    k = parameters + 1
    aicc = n * math.log(profile.least / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None
    return PowerLaw(
        a=Estimate(profile.a * profile.middle**profile.b, *profile.factor()),
        b=Estimate(profile.b, profile.low, profile.high),
        c=Estimate(profile.c, *profile.curve(math.inf)) if constant else None,
        deviation=math.sqrt(profile.least / (n - parameters)),
        aicc=aicc,
        _profile=profile,
    )


class _Profile:
    """Residual sum of squares along b, with the best a >= 0 and c >= 0 for each; sizes are in units of ``middle``."""

    def __init__(self, x: Sequence[float], y: Sequence[float], constant: bool) -> None:
        self._y, self._constant = np.asarray(y, dtype=float), constant
        logs = np.log(np.asarray(x, dtype=float))
        self.middle = math.exp(logs.mean())
        self._logs = logs - logs.mean()
        span = float(np.ptp(logs))
        # From a curve that looks like a logarithm or a constant to one that has vanished at the second size.
        grid = np.geomspace(1e-3 / span, 30 / span, _GRID)
        sums = self._solve(grid)[2]
        best = int(sums.argmin())
        around = (grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)])
        self.b = float(minimize_scalar(self._sum, bounds=around, method="bounded", options={"xatol": 1e-12}).x)
        self.a, self.c, least = (float(part[0]) for part in self._solve(np.array([self.b])))
        # Values are hardly exact to more than nine digits, and a residual of 0 would have no logarithm.
        self.least = max(least, len(y) * (1e-9 * float(self._y.max())) ** 2)
        freedom = len(y) - (3 if constant else 2)
        self._limit = self.least * (1 + float(f.ppf(_CONFIDENCE, 1, freedom)) / freedom)

        def excess(b: float) -> float:
            return self._sum(b) - self._limit

        grid = np.unique(np.append(grid, self.b))  # so that at least one is within the limit
        inside = np.flatnonzero(self._solve(grid)[2] <= self._limit)
        first, last = int(inside[0]), int(inside[-1])
        self.low = brentq(excess, *grid[first - 1 : first + 1]) if first else 0.0
        self.high = brentq(excess, *grid[last : last + 2]) if last + 1 < len(grid) else math.inf
        self._grid = np.linspace(max(self.low, grid[0]), min(self.high, grid[-1]), _GRID)

    def _sum(self, b: float) -> float:
        return float(self._solve(np.array([b]))[2][0])

    def _solve(self, b: Array) -> tuple[Array, Array, Array]:
        """The best a and c for each b, and the residual sum of squares: three arrays ``(len(b),)``."""
        powers = np.exp(-b[:, None] * self._logs)
        a, c = (powers @ self._y) / (powers**2).sum(1), np.zeros(len(b))
        if self._constant:
            centred = powers - powers.mean(1, keepdims=True)
            free = np.maximum((centred @ self._y) / (centred**2).sum(1), 0)
            rest = self._y.mean() - free * powers.mean(1)
            a, c = np.where(rest >= 0, free, a), np.maximum(rest, 0)
        return a, c, ((a[:, None] * powers + c[:, None] - self._y) ** 2).sum(1)

    def factor(self) -> tuple[float, float]:
        """The interval of a, for sizes in units of 1."""
        low, high = self._extremes(None) * self.middle**self._grid
        return max(float(np.nanmin(low)), 0.0), math.inf if self.high == math.inf else float(np.nanmax(high))

    def curve(self, x: float) -> tuple[float, float]:
        """The interval of the curve at size ``x``; at infinity that of c."""
        low, high = self._extremes(x)
        return max(float(np.nanmin(low)), 0.0), float(np.nanmax(high))

    def _extremes(self, x: float | None) -> Array:
        """For each b the ends ``(2, b)`` of a (x None) or of the curve at x, over all a and c >= 0 within the limit."""
        b, signs = self._grid, np.array([[-1], [1]])
        powers = np.exp(-b[:, None] * self._logs)
        at = np.ones(len(b)) if x is None else (x / self.middle) ** -b
        squares = (powers**2).sum(1)
        a = (powers @ self._y) / squares
        edge: Array = (a + signs * self._slack(a[:, None] * powers) / np.sqrt(squares)) * at
        if not self._constant:
            return edge
        # Regression on the powers: variances and covariances of a, c and the curve, in units of sigma^2.
        n, mean = len(self._y), powers.mean(1)
        centred = powers - mean[:, None]
        spread = (centred**2).sum(1)
        a = (centred @ self._y) / spread
        c = self._y.mean() - a * mean
        value = a if x is None else a * at + c
        variance = 1 / spread if x is None else 1 / n + (at - mean) ** 2 / spread
        with_c = -mean / spread if x is None else 1 / n - mean * (at - mean) / spread
        with_a = 1 / spread if x is None else (at - mean) / spread
        reach = signs * self._slack(a[:, None] * powers + c[:, None]) / np.sqrt(variance)
        level = self._y.mean()
        flat = 0 * edge if x is None else level + signs * self._slack(level + 0 * powers) / math.sqrt(n)
        # The region is convex: where its extreme point has c < 0 or a < 0, the extreme of what is allowed has 0 there.
        inner: Array = np.where(a + reach * with_a >= 0, value + reach * variance, flat)
        return np.where(c + reach * with_c >= 0, inner, edge)

    def _slack(self, fitted: Array) -> Array:
        """Square root of what remains up to the limit for each row; NaN: the limit is exceeded already."""
        left = self._limit - ((fitted - self._y) ** 2).sum(1)
        return np.sqrt(np.where(left > -1e-9 * self._limit, np.maximum(left, 0), np.nan))


def _score(x: Sequence[float], y: Sequence[float]) -> int:
    """Kendall's S: the number of pairs of points that rise minus the number that fall."""
    pairs = itertools.combinations(zip(x, y, strict=True), 2)
    products = [(x2 - x1) * (y2 - y1) for (x1, y1), (x2, y2) in pairs]
    return sum(int(product > 0) - int(product < 0) for product in products)
