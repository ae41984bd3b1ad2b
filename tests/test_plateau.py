"""Tests of `PlateauDetector`: what it promises on simulated series, and the rules of its interface."""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytest

from matent_callbacks import PlateauDetector

# Patience and the window it leads to.
WINDOWS = {5: 10, 10: 15, 20: 30}
RISE = 10  # patience windows before the plateau
PLATEAU = 6


def first_stop(values: Sequence[float | None], **arguments: Any) -> int | None:
    """Returns the index at which a fresh detector stops."""
    detector = PlateauDetector(**{"min_delta": 1.0, **arguments})
    return next((step for step, value in enumerate(values) if detector.update(step, value)), None)


def noisy(levels: Sequence[float], rng: random.Random) -> list[float]:
    """Adds noise of a standard deviation between 0.15 and 0.5."""
    deviation = rng.uniform(0.15, 0.5)
    return [level + rng.gauss(0, deviation) for level in levels]


def rise_then_flat(patience: int, rng: random.Random) -> list[float]:
    """Returns a noisy series that gains 1.5 to 3 per patience, then nothing."""
    slope = rng.uniform(1.5, 3.0) / patience
    return noisy([slope * min(step, RISE * patience) for step in range((RISE + PLATEAU) * patience)], rng)


def clean(values: list[float], rng: random.Random) -> list[float]:
    """Leaves the series as it is."""
    return values


def with_spikes(values: list[float], rng: random.Random) -> list[float]:
    """Puts 2 % of the points off by 5 to 10."""
    return [v + rng.choice((-1, 1)) * rng.uniform(5, 10) if rng.random() < 0.02 else v for v in values]


def with_gaps(values: list[float], rng: random.Random) -> list[float]:
    """Turns 10 % of the points into NaN."""
    return [math.nan if rng.random() < 0.1 else v for v in values]


@pytest.mark.parametrize("disturb", [clean, with_spikes, with_gaps])
@pytest.mark.parametrize("patience", WINDOWS)
def test_rise_is_not_stopped_and_its_plateau_is(
    patience: int, disturb: Callable[[list[float], random.Random], list[float]]
) -> None:
    rng = random.Random(patience)
    start = RISE * patience
    false_stops, delays = 0, []
    count = 200
    for _ in range(count):
        values = disturb(rise_then_flat(patience, rng), rng)
        stop = first_stop(values, patience=patience)
        assert stop is not None, "missed the plateau"
        if stop <= start:
            false_stops += 1
        else:
            delays.append(sum(map(math.isfinite, values[start + 1 : stop + 1])))
    assert false_stops <= 0.01 * count
    assert median(delays) <= 1.5 * patience


@pytest.mark.parametrize("disturb", [clean, with_spikes, with_gaps])
@pytest.mark.parametrize("slope", [0.0, -1.5, -3.0])
@pytest.mark.parametrize("patience", WINDOWS)
def test_flat_and_falling_series_stop(
    patience: int, slope: float, disturb: Callable[[list[float], random.Random], list[float]]
) -> None:
    rng = random.Random(patience)
    for _ in range(50):
        levels = [slope * step / patience for step in range(PLATEAU * patience)]
        assert first_stop(disturb(noisy(levels, rng), rng), patience=patience) is not None


@pytest.mark.parametrize("disturb", [clean, with_spikes])
def test_any_lets_both_directions_run_and_stops_the_flat(
    disturb: Callable[[list[float], random.Random], list[float]],
) -> None:
    rng = random.Random(0)
    patience, count, false_stops = 10, 200, 0
    for _ in range(count):
        values = disturb(rise_then_flat(patience, rng), rng)
        sign = rng.choice((-1, 1))
        stop = first_stop([sign * value for value in values], patience=patience, mode="any")
        assert stop is not None, "missed the plateau"
        false_stops += stop <= RISE * patience
    assert false_stops <= 0.01 * count


def decisions(detector: PlateauDetector, values: Sequence[float | None], first: int = 0) -> list[Any]:
    """Returns all that can be seen of the detector after each value."""
    seen = []
    for step, value in enumerate(values, first):
        stop = detector.update(step, value)
        seen.append((stop, detector.trend, detector.since_progress, detector.reason))
    return seen


def test_min_mirrors_max_exactly() -> None:
    values = rise_then_flat(10, random.Random(0))
    up = decisions(PlateauDetector(min_delta=1.0, patience=10), values)
    down = decisions(PlateauDetector(min_delta=1.0, patience=10, mode="min"), [-value for value in values])
    assert [(stop, since) for stop, _, since, _ in up] == [(stop, since) for stop, _, since, _ in down]
    assert [trend for _, trend, _, _ in up[1:]] == [-trend for _, trend, _, _ in down[1:]]
    assert any(stop for stop, *_ in up)


@pytest.mark.parametrize(("mode", "slope", "stops"), [
    ("max", 2.0, False), ("max", 0.0, True), ("max", -2.0, True),
    ("min", 2.0, True), ("min", 0.0, True), ("min", -2.0, False),
    ("any", 2.0, False), ("any", 0.0, True), ("any", -2.0, False),
])  # fmt: skip
def test_modes_without_noise(mode: str, slope: float, stops: bool) -> None:
    values = [slope * step / 10 for step in range(200)]
    assert first_stop(values, patience=10, mode=mode) == (WINDOWS[10] - 1 if stops else None)


@pytest.mark.parametrize("mode", ["max", "any"])
def test_exactly_min_delta_per_patience_is_no_plateau(mode: str) -> None:
    # Inexact in binary: its rounding errors alone would stop it at step 15.
    values = [1 + 0.001 * step / 5 for step in range(500)]
    assert first_stop(values, min_delta=0.001, patience=5, mode=mode) is None


def test_decision_is_that_of_the_confidence_interval_of_the_slope() -> None:
    # Sen's limit, from the sorted slopes of all pairs instead of by ranks.
    patience, size = 5, WINDOWS[5]
    pairs = size * (size - 1) // 2
    half_width = 1.959964 * math.sqrt(size * (size - 1) * (2 * size + 5) / 18)
    upper = math.ceil((pairs + half_width) / 2) - 1
    rng = random.Random(0)
    values = [rng.gauss(0.12 * step, 0.5) for step in range(2000)]
    detector = PlateauDetector(min_delta=1.0, patience=patience)
    stops = 0
    for step, value in enumerate(values):
        stop = detector.update(step, value)
        if step < size - 1:
            assert not stop
            continue
        indices = range(step - size + 1, step + 1)
        slopes = sorted((values[j] - values[i]) / (j - i) for i, j in itertools.combinations(indices, 2))
        assert stop == (slopes[upper] < 1.0 / patience)
        assert detector.trend == pytest.approx(median(slopes) * patience)
        stops += stop
    assert 0 < stops < 1000


@pytest.mark.parametrize("mode", ["max", "min", "any"])
def test_state_survives_an_interruption_at_every_point(mode: Any) -> None:
    rng = random.Random(1)
    values = with_gaps(rise_then_flat(5, rng), rng)
    whole = decisions(PlateauDetector(min_delta=1.0, patience=5, mode=mode, warmup_steps=3), values)
    assert len({stop for stop, *_ in whole}) == 2
    for cut in range(len(values) + 1):
        before = PlateauDetector(min_delta=1.0, patience=5, mode=mode, warmup_steps=3)
        seen = decisions(before, values[:cut])
        state = json.loads(json.dumps(before.state_dict(), allow_nan=False))
        after = PlateauDetector(min_delta=1.0, patience=5, mode=mode, warmup_steps=3)
        after.load_state_dict(state)
        assert (after.trend, after.since_progress, after.reason) == (before.trend, before.since_progress, before.reason)
        assert seen + decisions(after, values[cut:], cut) == whole


def test_state_is_a_copy_and_keeps_the_latest_for_a_shorter_window() -> None:
    long = PlateauDetector(min_delta=1.0, patience=20)
    decisions(long, [0.0] * 30)
    state = long.state_dict()
    long.update(30, 1.0)
    short = PlateauDetector(min_delta=1.0, patience=5)
    short.load_state_dict(state)
    assert [step for step, *_ in short.state_dict()["window"]] == list(range(20, 30))
    assert short.reason is not None


@pytest.mark.parametrize("state", [{}, {"window": 3}, {"window": [[1, 2.0]]}, {"window": [["a", 2.0, 1]]}, None])
def test_bad_state_is_refused_and_changes_nothing(state: Any) -> None:
    detector = PlateauDetector(min_delta=1.0, patience=5)
    detector.update(1, 2.0)
    with pytest.raises(ValueError, match="state"):
        detector.load_state_dict(state)
    assert detector.state_dict() == {"window": [[1, 2.0, 1]]}


def test_missing_values_are_no_observation() -> None:
    values = rise_then_flat(5, random.Random(2))
    expected = decisions(PlateauDetector(min_delta=1.0, patience=5), values)
    detector = PlateauDetector(min_delta=1.0, patience=5)
    for step, (value, seen) in enumerate(zip(values, expected, strict=True)):
        stop = detector.update(step, value)
        for missing in (None, math.nan, math.inf, -math.inf):
            # Not even the steps of missing values count: these would otherwise rewind the window.
            assert detector.update(0, missing) == stop
        assert (stop, detector.trend, detector.since_progress, detector.reason) == seen


def test_repeated_step_replaces_and_earlier_step_rewinds() -> None:
    values = rise_then_flat(5, random.Random(3))
    plain, repeated, rewound = (PlateauDetector(min_delta=1.0, patience=5) for _ in range(3))
    for step, value in enumerate(values):
        repeated.update(step, 1e6)
        assert repeated.update(step, value) == plain.update(step, value)
        assert repeated.state_dict() == plain.state_dict()
    decisions(rewound, values)
    assert rewound.reason is not None
    back = len(values) - 4
    assert not rewound.update(back, values[back])
    assert [step for step, *_ in rewound.state_dict()["window"]] == list(range(back - 6, back + 1))


def test_warmup_values_are_not_observed() -> None:
    fall, flat = [10.0 - step for step in range(30)], [3.0] * 30
    detector = PlateauDetector(min_delta=1.0, patience=5, warmup_steps=30)
    seen = decisions(detector, fall)
    assert set(seen) == {(False, None, 0, None)}
    assert first_stop(fall + flat, patience=5, warmup_steps=30) == 30 + WINDOWS[5] - 1
    assert first_stop(fall + flat, patience=5) == WINDOWS[5] - 1


def test_readings() -> None:
    detector = PlateauDetector(min_delta=0.5, patience=5)
    assert (detector.trend, detector.since_progress, detector.reason) == (None, 0, None)
    decisions(detector, [0.25 * step for step in range(20)])
    assert (detector.trend, detector.since_progress, detector.reason) == (1.25, 0, None)
    assert not detector.update(20, 4.75)
    assert detector.since_progress == 0  # one flat step does not undo the trend
    for step in range(21, 31):
        stop = detector.update(step, 4.75)
    assert stop
    assert detector.trend == 0
    assert 0 < detector.since_progress < 10
    assert detector.reason == (
        "plateau at step 30, value 4.75: trend +0 per 5 observations, "
        "below min_delta 0.5 with 95 % confidence (mode max)"
    )
    assert detector.update(31, 1000.0)  # nor does one outlier undo the plateau
    assert not [detector.update(step, 4.75 + step) for step in range(32, 38)][-1]
    assert detector.reason is None


@pytest.mark.parametrize("patience", [1, 2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 2.0])
def test_window_fits_patience_and_noise(patience: int, smoothing: float) -> None:
    detector = PlateauDetector(min_delta=1.0, patience=patience, smoothing=smoothing)
    first = next(step for step in itertools.count() if detector.update(step, 0.0))
    needed = max(
        5, math.ceil(1.5 * patience), math.ceil((12 * ((1.959964 + 1.644854) * smoothing * patience) ** 2) ** (1 / 3))
    )
    assert first == needed - 1


def test_more_smoothing_withstands_more_noise() -> None:
    rng = random.Random(0)
    stops = {0.5: 0, 2.0: 0}
    for _ in range(50):
        values = [rng.gauss(0.15 * step, 2.0) for step in range(150)]
        for smoothing in stops:
            stops[smoothing] += first_stop(values, patience=10, smoothing=smoothing) is not None
    assert stops[0.5] > 5
    assert stops[2.0] <= 1


def test_memory_is_bounded() -> None:
    detector = PlateauDetector(min_delta=1.0, patience=10)
    for step in range(1000):
        detector.update(step, float(step))
    assert len(detector.state_dict()["window"]) == WINDOWS[10]


def test_extreme_values_neither_raise_nor_stay() -> None:
    detector = PlateauDetector(min_delta=1e-300, patience=5)
    for step in range(40):
        detector.update(step, (-1) ** step * 1e308)
    assert [detector.update(step, 0.0) for step in range(40, 50)][-1]


@pytest.mark.parametrize(("name", "value"), [
    ("min_delta", 0), ("min_delta", -1.0), ("min_delta", math.nan), ("min_delta", math.inf), ("min_delta", "1"),
    ("patience", 0), ("patience", 2.5), ("patience", True), ("patience", None),
    ("mode", "maximum"), ("mode", None), ("mode", ["max"]),
    ("warmup_steps", -1), ("warmup_steps", 0.5),
    ("smoothing", -0.1), ("smoothing", math.nan), ("smoothing", math.inf), ("smoothing", "0.5"),
])  # fmt: skip
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    arguments = {"min_delta": 1.0, "patience": 5, name: value}
    with pytest.raises(ValueError, match=rf"^`{name}` must be .+, got ") as caught:
        PlateauDetector(**arguments)
    assert repr(value) in str(caught.value)
