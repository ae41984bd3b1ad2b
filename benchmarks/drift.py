"""Time of a measurement with drift over one without.

The same probe, of 2,048 tokens, is read in turn by three monitors of one model: without a reference, with one
(`diff_erank`), and with one and `drift`, `subspace_overlap` and `token_cosine`. All read all layers and log
`matrix_entropy` and `effective_rank`. *On the host* is what the hidden states of the reference take there, in float32.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, mebibytes, ratio
from benchmarks._workload import batches, make_model
from matent_callbacks import LoopMonitor

METRICS = ("matrix_entropy", "effective_rank")
COMPARED = ("drift", "subspace_overlap", "token_cosine")
GOAL = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: shows that it runs")
    quick = parser.parse_args().quick
    begin("Measurement with drift / without", __doc__)
    shapes = [(64, 2, 3)] if quick else [(256, 6, 20), (768, 4, 10), (2048, 2, 5)]  # width, blocks, rounds
    table(
        ["d", "drift / reference alone | goal | met", "drift / no reference", "on the host"],
        [compare(width, blocks, rounds) for width, blocks, rounds in shapes],
    )


def compare(width: int, blocks: int, rounds: int) -> list[str]:
    """The row of one model."""
    model = make_model(width, blocks)
    probe = list(itertools.islice(batches(), 2))
    kinds: dict[str, dict[str, Any]] = {
        "none": {"metrics": METRICS},
        "reference": {"metrics": METRICS, "reference": "start"},
        "drift": {"metrics": (*METRICS, *COMPARED), "reference": "start"},
    }
    measurements = {
        name: functools.partial(measure, LoopMonitor(model, 1, "all", probe=probe, pictures=False, **own), [0])
        for name, own in kinds.items()
    }
    seconds = interleaved(measurements, rounds=rounds)
    with_reference, without = (ratio(seconds["drift"], seconds[name]) for name in ("reference", "none"))
    on_host = sum(len(batch["input_ids"].flatten()) for batch in probe) * width * 4 * (blocks + 1)
    return [f"{width}, {blocks} blocks", with_reference.judged(GOAL), str(without), mebibytes(on_host)]


def measure(monitor: LoopMonitor, done: list[int]) -> None:
    done[0] += 1
    with monitor.step(done[0], ends=True):
        pass


if __name__ == "__main__":
    main()
