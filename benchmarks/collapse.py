"""How often `CollapseDetector` raises a false alarm and how late it detects a collapse, beside a plain threshold.

Both get the same simulated series, a floor of 0.25 of the highest value and the same patience; the threshold alarms
once the last `patience` observations lie below the floor, whatever their trend. A series begins at 1 and has
multiplicative noise with a standard deviation of 5 to 30 %, drawn per series.

A dip falls within 2 to 5 observations to 0.02 to 0.12, lies there for up to 0.3 patience, and climbs evenly on a
logarithmic scale to 0.4 within 0.5 to 1.5 patience, a slow one within 1.5 to 2.5. A sudden collapse falls as a dip does
after 0.5 to 4 patience, a creeping one within 2 to 4 patience, and both stay there for 8 patience. Spikes: 2 % of the
points after the first are 3 to 10 times as high or as low. Missing: 10 % are NaN.

An alarm in a dip, or before the series without its noise is below the floor, is false; none by the end is a miss.
Delays are counted in finite observations below the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks._markdown import begin, table
from matent_callbacks import CollapseDetector

PATIENCES = (10, 20)
FLOOR = 0.25

Floats = NDArray[np.float64]


class Case(NamedTuple):
    """A kind of series: how long its climb or its fall takes, in patience, and its disturbances."""

    name: str
    climb: tuple[float, float] | None = None
    fall: tuple[float, float] | None = None
    noise: tuple[float, float] = (0.05, 0.3)
    spikes: float = 0.0
    missing: float = 0.0
    in_range: bool = True


def cases() -> list[Case]:
    """Return the cases in the order of the table."""
    found = []
    for suffix, spikes, missing in (("", 0.0, 0.0), (", spikes", 0.02, 0.0), (", missing", 0.0, 0.1)):
        found += [
            Case(f"dip{suffix}", climb=(0.5, 1.5), spikes=spikes, missing=missing),
            Case(f"slow recovery{suffix}", climb=(1.5, 2.5), spikes=spikes, missing=missing),
            Case(f"sudden collapse{suffix}", spikes=spikes, missing=missing),
            Case(f"creeping collapse{suffix}", fall=(2.0, 4.0), spikes=spikes, missing=missing),
        ]
    beyond = Case("recovery within 4 patience, noise of 30 %", climb=(4.0, 4.0), noise=(0.3, 0.3), in_range=False)
    return [*found, beyond]


def simulate(case: Case, patience: int, rng: np.random.Generator) -> tuple[Floats, int | None]:
    """Return a series, and the index from which it stays below the floor; None if it recovers."""
    depth, drop = rng.uniform(0.02, 0.12), int(rng.integers(2, 6))
    if case.climb is not None:
        climb = round(rng.uniform(*case.climb) * patience)
        parts = [
            np.ones(rng.integers(1, 6)),
            np.geomspace(1, depth, drop),
            np.full(round(rng.uniform(0, 0.3) * patience), depth),
            np.geomspace(depth, 0.4, climb),
            np.full(3 * patience, 0.4),
        ]
        collapsed = None
    else:
        fall = drop if case.fall is None else round(rng.uniform(*case.fall) * patience)
        parts = [
            np.ones(round(rng.uniform(0.5, 4) * patience)),
            np.geomspace(1, depth, fall),
            np.full(8 * patience, depth),
        ]
        collapsed = int(np.argmax(np.concatenate(parts) < FLOOR))
    level = np.concatenate(parts)
    values = level * np.exp(rng.uniform(*case.noise) * rng.standard_normal(len(level)))
    spiked = rng.random(len(level)) < case.spikes
    spiked[0] = False
    values[spiked] *= _spikes(rng, int(spiked.sum()))
    values[rng.random(len(level)) < case.missing] = np.nan
    return values, collapsed


def _spikes(rng: np.random.Generator, count: int) -> Floats:
    factors = rng.uniform(3, 10, count)
    return np.where(rng.random(count) < 0.5, factors, 1 / factors)


def ours(patience: int) -> Callable[[int, float], bool]:
    """Return the alarm rule of this package."""
    return CollapseDetector(floor=FLOOR, patience=patience).update


def threshold(patience: int) -> Callable[[int, float], bool]:
    """Return a rule that alarms once the last ``patience`` finite observations are below the floor."""
    highest, count = -np.inf, 0

    def update(step: int, value: float) -> bool:
        nonlocal highest, count
        if np.isfinite(value):
            highest = max(highest, value)
            count = count + 1 if value < FLOOR * highest else 0
        return count >= patience

    return update


METHODS = {"ours": ours, "threshold": threshold}


def score(case: Case, method: str, patience: int, series: list[tuple[Floats, int | None]]) -> tuple[str, str, str]:
    """Return the percentage of false alarms, the median delay in patience, and the percentage of misses, as text."""
    false, missed, delays = 0, 0, []
    for values, collapsed in series:
        update = METHODS[method](patience)
        alarm = next((step for step, value in enumerate(values.tolist()) if update(step, value)), None)
        if alarm is not None and (collapsed is None or alarm < collapsed):
            false += 1
        elif collapsed is not None and alarm is None:
            missed += 1
        elif collapsed is not None and alarm is not None:
            delays.append(np.isfinite(values[collapsed : alarm + 1]).sum() / patience)
    share = 100 / len(series)
    delay = f"{np.median(delays):.2f}" if delays else "-"
    return f"{share * false:.1f}", delay, f"{share * missed:.1f}" if case.climb is None else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer series: shows that it runs")
    count = 20 if parser.parse_args().quick else 1000
    begin("Collapse or dip", __doc__)
    rows = []
    for number, case in enumerate(cases()):
        rng = np.random.default_rng(number)
        series = {p: [simulate(case, p, rng) for _ in range(count)] for p in PATIENCES}
        for method in METHODS:
            columns = zip(*(score(case, method, p, series[p]) for p in PATIENCES), strict=True)
            rows.append([case.name + ("" if case.in_range else " (beyond)"), method, *map(" / ".join, columns)])
    print(f"{count} series a case and patience; patience {' / '.join(map(str, PATIENCES))}.\n")
    table(["case", "", "false alarms %", "median delay (in patience)", "misses %"], rows)


if __name__ == "__main__":
    main()
