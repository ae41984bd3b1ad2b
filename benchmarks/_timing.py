"""Ratios of durations measured in turn, and peak memory."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Ratio(NamedTuple):
    """Median of many ratios, with the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def judged(self, at_most: float) -> str:
        """Format the ratio, its goal, and whether it is met, as cells of a table."""
        return f"{self} | {at_most:g} | {'yes' if self.median <= at_most else '**no**'}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Compare two series that were measured in turn, so that drift of the machine is in both parts of each pair."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def interleaved(functions: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; the order is drawn anew for each round."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name in order.sample(list(functions), len(functions)):
            start = time.perf_counter()
            functions[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the peak memory that torch's CPU allocator handed out in a call on one thread, beyond that before it.

    From the profiler's record of every allocation: exact, and including the solver's workspace, which resident memory
    would only show if no freed page were kept.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees no other thread
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
