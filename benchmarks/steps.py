"""Step time with the Trainer callback over step time without.

One Trainer takes single steps with and without the callback, in an order drawn anew in each round. *Monitored* is a
step that is read, *not due* one with the callback on that is not. `every_n_steps` = n is one of the former and n - 1
of the latter.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks._markdown import begin, table
from benchmarks._timing import Ratio, ratio
from benchmarks._workload import BATCH, LENGTH, seconds_in_turn
from matent_callbacks.transformers import MatrixEntropyCallback

NEVER = 10**9
GOALS = {"all, monitored": 1.08, "all, `every_n_steps=50`": 1.005}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models and few steps: shows that it runs")
    quick = parser.parse_args().quick
    begin("Step time with the callback / without", __doc__)
    # Width, blocks, rounds of monitored steps and of steps that are not due: these cost little, so it takes many.
    settings = [(64, 2, 6, 6), (128, 2, 3, 3)] if quick else [(256, 6, 100, 250), (768, 4, 16, 30), (2048, 2, 5, 5)]
    print(f"Llama, {BATCH} x {LENGTH} tokens a step; in the first column the seconds of a plain step.\n")
    rows = [row for width, blocks, *rounds in settings for row in step_rows(width, blocks, *rounds)]
    table(["d", "layers", "with / without | goal | met"], rows)


def step_rows(width: int, blocks: int, rounds: int, idle_rounds: int) -> list[list[str]]:
    """The rows of one model."""
    sets = {which: [MatrixEntropyCallback(1, which)] for which in ("last", "all")}
    seconds = seconds_in_turn({**sets, "plain": []}, width=width, layers=blocks, rounds=rounds)
    idle = seconds_in_turn(
        {"idle": [MatrixEntropyCallback(NEVER, "all")], "plain": []}, width=width, layers=blocks, rounds=idle_rounds
    )
    not_due = ratio(idle["idle"], idle["plain"])
    found = {"all, not due": not_due}
    for which in sets:
        monitored = ratio(seconds[which], seconds["plain"])
        found[f"{which}, monitored"] = monitored
        for n in (10, 50):
            among = zip(monitored, not_due, strict=True)
            found[f"{which}, `every_n_steps={n}`"] = Ratio(*((one + (n - 1) * other) / n for one, other in among))
    shape = f"{width}, {blocks} blocks, {statistics.median(seconds['plain']):.2f} s"
    return [[shape, name, judged(value, GOALS.get(name))] for name, value in found.items()]


def judged(found: Ratio, goal: float | None) -> str:
    return f"{found} | |" if goal is None else found.judged(goal)


if __name__ == "__main__":
    main()
