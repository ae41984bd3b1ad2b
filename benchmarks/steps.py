"""Step time with the Trainer callback over step time without.

One Trainer takes its steps with and without the callback, in an order drawn anew in each round. Under `every_n_steps`
= 1 stands a monitored step over a plain one. *Measured*: whole windows of so many steps, with over without.
*Computed*: from the measured monitored step, the others taken to cost nothing, which the rows *never due* check.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks._report import begin, table
from benchmarks._timing import Ratio, ratio
from benchmarks._training import BATCH, LENGTH, seconds_in_turn
from matent_callbacks.transformers import MatrixEntropyCallback

NEVER = 10**9
GOALS = {1: 1.08, 50: 1.005}
Windows = dict[int, int]
"""Rounds by length of the window."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models and few steps: shows that it runs")
    quick = parser.parse_args().quick
    begin("Step time with the callback / without", __doc__)
    # Width, blocks, rounds of single steps, rounds of whole windows: those of the wide models would take minutes each.
    settings: list[tuple[int, int, int, Windows]] = [(256, 6, 40, {10: 6, 50: 4}), (768, 4, 12, {}), (2048, 2, 4, {})]
    if quick:
        settings = [(64, 2, 6, {10: 2}), (128, 2, 3, {})]
    print(f"Llama, {BATCH} x {LENGTH} tokens a step; in the first column the seconds of a plain step.\n")
    rows = []
    for width, blocks, rounds, windows in settings:
        rows += step_rows(width, blocks, rounds, windows)
    table(["d", "layers", "`every_n_steps`", "with / without | goal | met", ""], rows)


def step_rows(width: int, blocks: int, rounds: int, windows: Windows) -> list[list[str]]:
    """The rows of one model."""
    sets = {which: [MatrixEntropyCallback(1, which)] for which in ("last", "all")}
    sets |= {"plain": [], "idle": [MatrixEntropyCallback(NEVER, "all")]}
    seconds = seconds_in_turn(sets, width=width, layers=blocks, rounds=rounds)
    idle = ratio(seconds["idle"], seconds["plain"])
    shape = f"{width}, {blocks} blocks, {statistics.median(seconds['plain']):.2f} s"
    rows = []
    for which in ("last", "all"):
        monitored = ratio(seconds[which], seconds["plain"])
        rows.append([shape, which, "1", judged(monitored, which, 1), "measured"])
        for interval in (10, 50):
            if which == "all" and interval in windows:
                run = window_ratio(width, blocks, interval, windows[interval])
                rows.append([shape, which, str(interval), judged(run, which, interval), "measured"])
            else:
                run = Ratio(*(1 + (value - 1) / interval for value in monitored))
                rows.append([shape, which, str(interval), judged(run, which, interval), "computed"])
    rows.append([shape, "all", "never due", f"{idle} | |", "measured"])
    return rows


def window_ratio(width: int, blocks: int, interval: int, rounds: int) -> Ratio:
    """Windows of one interval each, with one monitored step in it and without."""
    sets = {"all": [MatrixEntropyCallback(interval, "all")], "plain": []}
    seconds = seconds_in_turn(sets, width=width, layers=blocks, rounds=rounds, window=interval, warm_up=0)
    return ratio(seconds["all"], seconds["plain"])


def judged(found: Ratio, which: str, interval: int) -> str:
    goal = GOALS.get(interval) if which == "all" else None
    return f"{found} | |" if goal is None else found.judged(goal)


if __name__ == "__main__":
    main()
