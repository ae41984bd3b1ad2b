"""Distinguishes a collapse from the dip of a healthy run."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from statistics import NormalDist, median
from typing import Any, Literal, NamedTuple

from matent_callbacks.plateau import kendall_score

_Z = NormalDist().inv_cdf(0.95)
_HORIZON = 8  # in patience: a slower climb does not count. Chosen by benchmarks/collapse.py and three real runs.


class _Observation(NamedTuple):
    """A value, with the highest level and the first value of the series before it."""

    step: int
    value: float
    highest: float | None
    first: float | None

    @classmethod
    def of(cls, step: Any, value: Any, highest: Any, first: Any = None) -> _Observation:
        """Make one of the types of JSON."""
        # States of earlier versions have one reference.
        first = highest if first is None else first
        return cls(int(step), float(value), *(None if level is None else float(level) for level in (highest, first)))


class CollapseDetector:
    """Decides whether a series has fallen far below its level and does not come back, by a rank test on its trend.

    The effective rank of a healthy run falls in the first steps as far as that of a collapsed one, but then it climbs.
    So a low value is no alarm: the last ``patience`` observations have to lie below ``floor`` times the reference and
    must not climb. Kendall's S (Mann 1945; Kendall 1975) over the observations since the fall, at most 2 ``patience``
    of them, decides with 95 % confidence, one-sided. After ``patience`` observations the alarm is raised if they fall,
    or are all equal. From 1.5 ``patience`` on it is raised unless they climb at a pace that leads back to the floor
    within 8 ``patience``: it takes that further half ``patience`` to see a slow recovery through noise of 30 %.
    Ranks make single outliers among them harmless.

    An observation is one call of ``update`` with a finite value.

    Args:
        floor: Share of the reference below which the series has to lie; between 0 and 1.
        patience: Number of observations that have to lie there.
        relative_to: The reference. ``"max"``: the highest level so far, a level being the first observation or the
            lower one of two neighbours, so that a single spike does not count; ``"first"``: the first observation; or
            a number above 0. A reference that is not above 0 never gives an alarm.
        warmup_steps: Values at steps below this are not observed.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from matent_callbacks import CollapseDetector
        >>> detector = CollapseDetector(floor=0.25, patience=5)
        >>> collapsed = [60.0, 61.0, *[2.0] * 6]
        >>> next(step for step, value in enumerate(collapsed) if detector.update(step, value))
        6
        >>> detector.reason
        'collapse at step 6, value 2: below 15 (0.25 of 60) for 5 observations, and not climbing'
    """

    def __init__(
        self,
        *,
        floor: float,
        patience: int,
        relative_to: Literal["max", "first"] | float = "max",
        warmup_steps: int = 0,
    ) -> None:
        if not _is_number(floor) or not 0 < floor < 1:
            raise ValueError(f"`floor` must be a number between 0 and 1, got {floor!r}.")
        for name, number, least in (("patience", patience, 2), ("warmup_steps", warmup_steps, 0)):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {number!r}.")
        if relative_to not in ("max", "first") and not (_is_number(relative_to) and 0 < float(relative_to) < math.inf):
            raise ValueError(f"`relative_to` must be 'max', 'first' or a number above 0, got {relative_to!r}.")
        self._floor, self._patience, self._warmup_steps = floor, patience, warmup_steps
        self._relative_to = relative_to
        # Everything else follows from these.
        self._window: deque[_Observation] = deque(maxlen=2 * patience)

    def update(self, step: int, value: float | None) -> bool:
        """Observe one value and return whether the series has collapsed.

        Args:
            step: Training step of the value. Observations at this step or later ones are dropped first, so a run that
                is rewound rewinds the window.
            value: The metric. ``None``, NaN and infinities are no observation and change nothing.

        Returns:
            True while the series is collapsed: it turns False again when the series recovers.

        Example:
            >>> detector = CollapseDetector(floor=0.5, patience=3, relative_to=10)
            >>> [detector.update(step, value) for step, value in enumerate([4.0, 4.0, 4.0, 8.0])]
            [False, False, True, False]
        """
        if value is not None and math.isfinite(value):
            first, highest = self._first, self._highest
            while self._window and self._window[-1].step >= step:
                _, _, highest, first = self._window.pop()
            if step >= self._warmup_steps:
                self._window.append(_Observation(int(step), float(value), highest, first))
        return self._is_collapsed()

    @property
    def reference(self) -> float | None:
        """The level that the floor is a share of; None before the first observation.

        Example:
            >>> detector = CollapseDetector(floor=0.25, patience=5)
            >>> [detector.update(step, value) for step, value in enumerate([50.0, 400.0, 52.0, 51.0])]
            [False, False, False, False]
            >>> detector.reference
            52.0
        """
        if isinstance(self._relative_to, int | float):
            return float(self._relative_to)
        return self._first if self._relative_to == "first" else self._highest

    @property
    def reason(self) -> str | None:
        """What has collapsed where, in one line; None while nothing has.

        Example:
            >>> CollapseDetector(floor=0.25, patience=5).reason is None
            True
        """
        if not self._is_collapsed():
            return None
        reference = self.reference
        assert reference is not None
        step, value, *_ = self._window[-1]
        return (
            f"collapse at step {step}, value {value:.6g}: below {self._floor * reference:.6g} ({self._floor:g} of "
            f"{reference:.6g}) for {len(self._below())} observations, and not climbing"
        )

    def state_dict(self) -> dict[str, Any]:
        """What has been observed, as JSON types only; the arguments are not part of it.

        Example:
            >>> detector = CollapseDetector(floor=0.25, patience=5)
            >>> detector.update(100, 2.5), detector.state_dict()
            (False, {'window': [[100, 2.5, None, None]]})
        """
        return {"window": [list(observation) for observation in self._window]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the latest observations are kept if ``patience`` has been lowered.

        With another ``relative_to`` the reference is what it would have been from the beginning.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If it is anything else.

        Example:
            >>> detector = CollapseDetector(floor=0.25, patience=5)
            >>> detector.load_state_dict({"window": [[100, 40.0, None, None], [200, 42.0, 40.0, 40.0]]})
            >>> detector.reference
            40.0
        """
        try:
            window = [_Observation.of(*row) for row in state["window"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`state` must be what state_dict returned, got {state!r}.") from error
        self._window = deque(window, maxlen=self._window.maxlen)

    @property
    def _first(self) -> float | None:
        """The first observation of the series."""
        if not self._window:
            return None
        last = self._window[-1]
        return last.value if last.first is None else last.first

    @property
    def _highest(self) -> float | None:
        """The highest level so far."""
        if not self._window:
            return None
        *before, last = self._window
        if last.highest is None or not before:
            return last.value if last.highest is None else last.highest
        return max(last.highest, min(last.value, before[-1].value))

    def _below(self) -> list[float]:
        """Return the latest consecutive observations that lie below the floor."""
        reference, below = self.reference, list[float]()
        for _, value, *_ in reversed(self._window):
            if reference is None or reference <= 0 or value >= self._floor * reference:
                break
            below.append(value)
        return below[::-1]

    def _is_collapsed(self) -> bool:
        below = self._below()
        if len(below) < self._patience:
            return False
        if _falls(below):
            return True
        reference = self.reference
        assert reference is not None  # something lies below it
        pace = (self._floor * reference - median(below)) / (_HORIZON * self._patience)
        return len(below) >= 1.5 * self._patience and _falls([value - pace * i for i, value in enumerate(below)])


def _falls(values: list[float]) -> bool:
    """Whether values fall with 95 % confidence, or are all equal. Ties narrow the spread of S (Kendall 1975)."""
    whole, *tied = (size * (size - 1) * (2 * size + 5) for size in (len(values), *Counter(values).values()))
    return kendall_score(values) <= -_Z * math.sqrt((whole - sum(tied)) / 18)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
