"""Detects when a noisy metric has demonstrably stopped moving."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import NormalDist, median
from typing import Any, Literal

_Z_LIMIT = NormalDist().inv_cdf(0.975)  # the usual two-sided 95 % confidence interval
_Z_POWER = NormalDist().inv_cdf(0.95)  # a 95 % chance to recognise a flat window
# Five points are the fewest that can be significant: they fall in strict order by chance in 1/5! = 0.8 %, four in 4 %.
_MIN_WINDOW = 5


class PlateauDetector:
    """Decides whether a noisy series still makes progress, by a rank test on its trend.

    Early stopping that compares with the best value so far lets one lucky value end a run that makes progress. This
    stops when the 95 % confidence interval of the Theil-Sen slope (Theil 1950; Sen 1968, doi:10.2307/2285891) over
    the latest observations lies wholly below ``min_delta`` per ``patience`` observations. By Sen's construction that is
    the same as Kendall's S (Mann 1945; Kendall 1975) of the series minus a line of that slope being significantly
    negative, which is what is computed. Ranks make single outliers harmless.

    The window is 1.5 ``patience``, or longer if needed to recognise a flat series with noise of the stated size in 95 %
    of the cases, by the least-squares standard error of a slope: 10, 15 and 30 observations for a patience of 5, 10
    and 20. Nothing is decided before it is full.

    An observation is one call of ``update`` with a finite value. Observations count as evenly spaced and their noise as
    independent: if neighbouring values share it, raise ``smoothing``. A series that moves by about ``min_delta`` per
    ``patience`` observations can be decided either way.

    Args:
        min_delta: Change per ``patience`` observations that counts as progress. Must be positive: a flat series
            cannot be distinguished from one that rises arbitrarily slowly.
        patience: Number of observations in which ``min_delta`` has to be gained.
        mode: "max" stops when the series no longer rises (a falling one has a plateau, too), "min" when it no longer
            falls, "any" when it does neither.
        warmup_steps: Values at steps below this are not observed.
        smoothing: Standard deviation of the noise to be averaged out, in units of ``min_delta``. Where it makes
            the window longer than 1.5 ``patience``, the window grows with its 2/3rd power.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> detector = PlateauDetector(min_delta=1.0, patience=5)
        >>> series = [0.5 * min(step, 30) for step in range(60)]
        >>> next(step for step, value in enumerate(series) if detector.update(step, value))
        37
        >>> detector.reason
        'plateau at step 37, value 15: trend +0 per 5 observations, below min_delta 1 with 95 % confidence (mode max)'
    """

    def __init__(
        self,
        *,
        min_delta: float,
        patience: int,
        mode: Literal["max", "min", "any"] = "max",
        warmup_steps: int = 0,
        smoothing: float = 0.45,
    ) -> None:
        directions = {"max": (1,), "min": (-1,), "any": (1, -1)}
        for name, number, kind, valid, expected in (
            ("min_delta", min_delta, (int, float), lambda x: 0 < x < math.inf, "a finite number above 0"),
            ("patience", patience, int, lambda x: x >= 1, "an integer of at least 1"),
            ("mode", mode, str, lambda x: x in directions, f"one of {', '.join(directions)}"),
            ("warmup_steps", warmup_steps, int, lambda x: x >= 0, "an integer of at least 0"),
            ("smoothing", smoothing, (int, float), lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
        ):
            if isinstance(number, bool) or not isinstance(number, kind) or not valid(number):
                raise ValueError(f"`{name}` must be {expected}, got {number!r}.")
        self._min_delta, self._patience, self._warmup_steps = min_delta, patience, warmup_steps
        self._mode, self._directions = mode, directions[mode]
        # Standard error of a slope over n points: sd * sqrt(12 / n^3) per observation.
        needed = 12 ** (1 / 3) * ((_Z_LIMIT + _Z_POWER) * smoothing * patience) ** (2 / 3)
        # A plateau cannot be recognised much sooner than after ``patience``; half as much again buys certainty.
        size = max(_MIN_WINDOW, math.ceil(1.5 * patience), math.ceil(needed))
        # Normal approximation of S; for windows of 5 and more its 2.5 % are 0.8 to 3.1 % by exact count.
        self._critical = _Z_LIMIT * math.sqrt(size * (size - 1) * (2 * size + 5) / 18)
        # (step, value, observations since progress): everything else follows from these, so they are the whole state.
        self._window: deque[tuple[int, float, int]] = deque(maxlen=size)

    def update(self, step: int, value: float | None) -> bool:
        """Observe one value and return whether the plateau is reached.

        Args:
            step: Training step of the value. Observations at this step or later ones are dropped first, so an
                evaluation that is repeated replaces the earlier one, and a run that is rewound rewinds the window.
            value: The metric. ``None``, NaN and infinities are no observation and change nothing.

        Returns:
            True if the current window shows a plateau. It can turn False again if training goes on regardless.

        Example:
            >>> detector = PlateauDetector(min_delta=1.0, patience=5)
            >>> [detector.update(step, float("nan") if step == 3 else 7.0) for step in range(11)].index(True)
            10
        """
        if value is not None and math.isfinite(value):
            while self._window and self._window[-1][0] >= step:
                self._window.pop()
            if step >= self._warmup_steps:
                observation = (int(step), float(value))
                self._window.append((*observation, self.since_progress + 1))
                if max(map(self._kendall, self._directions)) > 0:  # the Theil-Sen slope exceeds min_delta
                    self._window[-1] = (*observation, 0)
        return self._is_plateau()

    def _kendall(self, direction: int) -> int:
        """Kendall's S of the window minus a line rising by min_delta per patience observations in ``direction``."""
        # Rounded, so that float errors on a noise-free line are ties and not a trend.
        return kendall_score(
            round(direction * value / self._min_delta - index / self._patience, 9)
            for index, (_, value, _) in enumerate(self._window)
        )

    def _is_plateau(self) -> bool:
        if len(self._window) != self._window.maxlen or self.since_progress == 0:  # the latter only to save time
            return False
        return max(map(self._kendall, self._directions)) <= -self._critical

    @property
    def trend(self) -> float | None:
        """Theil-Sen estimate of the change per ``patience`` observations; None before the second observation.

        Example:
            >>> detector = PlateauDetector(min_delta=1.0, patience=10)
            >>> [detector.update(step, 0.25 * step) for step in range(2)], detector.trend
            ([False, False], 2.5)
        """
        values = [value for _, value, _ in self._window]
        slopes = [(values[j] - values[i]) / (j - i) for j in range(len(values)) for i in range(j)]
        return median(slopes) * self._patience if slopes else None

    @property
    def since_progress(self) -> int:
        """Number of observations since the trend was last above ``min_delta``, or since the first one.

        Example:
            >>> detector = PlateauDetector(min_delta=1.0, patience=5)
            >>> [detector.update(step, 3.0) for step in range(2)], detector.since_progress
            ([False, False], 2)
        """
        return self._window[-1][2] if self._window else 0

    @property
    def reason(self) -> str | None:
        """Why and where it stopped, in one line; None while there is no plateau.

        Example:
            >>> PlateauDetector(min_delta=1.0, patience=5).reason is None
            True
        """
        if not self._is_plateau():
            return None
        step, value, _ = self._window[-1]
        return (
            f"plateau at step {step}, value {value:.6g}: trend {self.trend:+.3g} per {self._patience} observations, "
            f"below min_delta {self._min_delta:g} with 95 % confidence (mode {self._mode})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What has been observed, as JSON types only; the arguments are not part of it.

        Example:
            >>> detector = PlateauDetector(min_delta=1.0, patience=5)
            >>> detector.update(100, 2.5), detector.state_dict()
            (False, {'window': [[100, 2.5, 1]]})
        """
        return {"window": [list(observation) for observation in self._window]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; the latest observations are kept if ``patience`` or ``smoothing`` have been lowered.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If it is anything else.

        Example:
            >>> detector = PlateauDetector(min_delta=1.0, patience=5)
            >>> detector.load_state_dict({"window": [[100, 2.5, 1], [200, 2.75, 2]]})
            >>> detector.since_progress
            2
        """
        try:
            window = [(int(step), float(value), int(since)) for step, value, since in state["window"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`state` must be what state_dict returned, got {state!r}.") from error
        self._window = deque(window, maxlen=self._window.maxlen)


def kendall_score(values: Iterable[float]) -> int:
    """Kendall's S: the number of pairs that rise minus the number of pairs that fall."""
    score, ranked = 0, list[float]()
    for index, value in enumerate(values):
        low, high = bisect_left(ranked, value), bisect_right(ranked, value)
        score += low - (index - high)
        ranked.insert(low, value)
    return score
