"""What a stop is worth where a model has to begin to look: `PlateauStopping` and the frameworks' rules, on four keys.

`examples/finetune_vlm.py --to-the-end`, once for each seed; then each rule is given what was logged, reading by
reading. A model *looks* from the first reading on at which the right image is worth 0.1 nats per token to it. *Too
early* are the runs that a rule ends before that: such models know what captions are like, and nothing of images.
*Lost* is the held-out loss at the stop less that at the end, in nats per token. Medians over the runs that are stopped,
with the least and the greatest. On one key all rules have the same patience, in readings, and the same `min_delta`; the
frameworks' own are called as they are, Hugging Face's with its default threshold of 0, too.

The runs are in `stopping_alignment.json`; without it, or with `--retrain`, they are trained (4 minutes each).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._markdown import begin, conditions, table
from benchmarks.plateau import METHODS

RUNS = Path(__file__).parent / "stopping_alignment.json"
EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_vlm.py"
SEEDS = 5
PATIENCE = 5  # readings
LOOKS = 0.1  # nats per token

Record = dict[str, float]


class Watched(NamedTuple):
    """A key, how much of a change counts as progress, and in which direction."""

    key: str
    min_delta: float
    sign: int


WATCHED = (
    Watched("alignment/image_text", 0.02, 1),
    Watched("alignment/cka_z", 2.0, 1),
    Watched("alignment/grounding", 0.2, 1),
    Watched("eval_loss", 0.05, -1),
)
KEYS = tuple(watched.key for watched in WATCHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retrain", action="store_true", help="train, although there are runs")
    parser.add_argument("--quick", action="store_true", help="two runs of a few steps: shows that it runs")
    arguments = parser.parse_args()
    begin("What a stop is worth", __doc__)
    if arguments.quick:
        runs = [train(seed, "--steps", "8", "--tower-steps", "2", "--every", "1") for seed in range(2)]
    else:
        runs, trained = cached(retrain=arguments.retrain)
        print(f"Trained: {trained}.\n")
    looks = [first_look(run) for run in runs]
    ends = [run[-1] for run in runs]
    print(
        f"{len(runs)} runs of {ends[0]['step']:.0f} steps. They look from step {spread(looks, '.0f')} on and end "
        f"with a held-out loss of {spread([end['eval_loss'] for end in ends], '.3f')}, a grounding of "
        f"{spread([end['alignment/grounding'] for end in ends], '.2f')}. Patience {PATIENCE}.\n"
    )
    header = ["key (`min_delta`)", "rule", "stops", "too early", "at step", "saved, %", "lost"]
    table(header, (row(watched, rule, runs, looks) for watched in WATCHED for rule in METHODS))


def cached(*, retrain: bool) -> tuple[list[list[Record]], str]:
    """Return all runs and the conditions they were trained under; each is saved as soon as it is finished."""
    found: dict[str, Any] = {"trained": conditions("transformers"), "runs": []}
    if RUNS.exists() and not retrain:
        found = json.loads(RUNS.read_text(encoding="utf-8"))
    for seed in range(len(found["runs"]), SEEDS):
        found["runs"].append(train(seed))
        RUNS.write_text(json.dumps(found), encoding="utf-8")
    return found["runs"], found["trained"]


def train(seed: int, *options: str, keys: Sequence[str] = KEYS) -> list[Record]:
    """Run the example, and return what it logs at its readings."""
    keys = ["step", "eval_loss", *keys]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLE), "--to-the-end", "--seed", str(seed), "--output", folder, *options]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "WANDB_MODE": "disabled"})
        history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    readings: dict[int, Record] = {}
    for record in history:  # a step may have several records
        readings.setdefault(record["step"], {}).update({key: round(record[key], 6) for key in keys if key in record})
    return [reading for _, reading in sorted(readings.items()) if len(reading) == len(set(keys))]


def first_look(run: list[Record]) -> float:
    """Return the step from which on the model looks; infinite if it never does."""
    return next((reading["step"] for reading in run if reading["alignment/grounding"] > LOOKS), float("inf"))


def row(watched: Watched, rule: str, runs: list[list[Record]], looks: list[float]) -> list[str]:
    early, steps, saved, lost = 0, [], [], []
    for run, look in zip(runs, looks, strict=True):
        stop = stopped(watched, rule, run)
        if stop is None:
            continue
        early += stop["step"] < look
        steps.append(stop["step"])
        saved.append(100 * (1 - stop["step"] / run[-1]["step"]))
        lost.append(stop["eval_loss"] - run[-1]["eval_loss"])
    key = f"`{watched.key}` ({watched.min_delta:g})"
    counts = [f"{len(steps)} of {len(runs)}", f"{early} of {len(runs)}"]
    return [key, rule, *counts, spread(steps, ".0f"), spread(saved, ".0f"), spread(lost, "+.3f")]


def stopped(watched: Watched, rule: str, run: list[Record]) -> Record | None:
    """Return the reading at which a rule ends a run."""
    update = METHODS[rule](PATIENCE)  # for values scaled so that an increase of 1 is progress
    scale = watched.sign / watched.min_delta
    return next((reading for reading in run if update(int(reading["step"]), scale * reading[watched.key])), None)


def spread(values: Sequence[float], form: str) -> str:
    """Format median, minimum and maximum."""
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
