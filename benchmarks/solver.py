"""Wide layers: estimates / all eigenvalues.

*Accuracy*: each draw has other probes. The worst of all draws, in percent of the entropy; the standard error that the
estimate tells, the mean over the draws; and in how many draws it is true, taken three times. *Shares* is the worst of
the shares of the first 1, 2, 4, 8 and 16 directions, in percent of the share; it takes 10 products instead of 6. The
rule: within 0.2 % in each draw, and three standard errors true in 95 % of them. The covariances are diagonal: probes
from a normal distribution have no direction, so that the estimates have the same distribution in every basis (the row
"in random directions" is a check of it). Eigenvalues of networks and of SmolLM2 are those of the covariance of their
hidden states in float64; the exponential is there to show how an estimate fails: it is not among what the rule holds
for.

*Time*: all of `compute()` for four layers, `solver="exact"` / `solver="auto"`, in turn in one process.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks._markdown import begin, table
from benchmarks._spectra import spectra
from benchmarks._stack import identities
from benchmarks._timing import interleaved, ratio
from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.catalogue import Solver
from matent_callbacks.functional._estimate import BLOCK, STEPS, Estimate, Projection, estimates, krylov, normal, project
from matent_callbacks.monitor import decomposition
from matent_callbacks.monitor.readings import PendingReadings

BOUND, HELD = 0.002, 0.95
DIRECTIONS = (1, 2, 4, 8, 16)
STEPS_FOR_DIRECTIONS = 10
LAYERS = 4
METRICS = {"the default": ("matrix_entropy", "effective_rank"), "with shares": ("effective_rank", "spectrum")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices: shows that it runs")
    parser.add_argument("--part", choices=("accuracy", "time"), help="only this table")
    arguments = parser.parse_args()
    quick = arguments.quick
    begin("Wide layers: estimates / all eigenvalues", __doc__)
    if arguments.part != "time":
        studied = {512: 4} if quick else {2048: 100, 4096: 100}
        found = (row for width, draws in studied.items() for row in accuracy(width, draws, quick))
        table(["d", "spectrum", "entropy", "draws", "worst", "standard error", "true", "met", "shares"], found)
    if arguments.part != "accuracy":
        print(f"Load of the machine as it began: {os.getloadavg()[0]:.1f}.\n")
        widths = {512: 3} if quick else {512: 9, 768: 9, 1024: 9, 2048: 5, 4096: 3}
        rows = (row for width, rounds in widths.items() for row in times(width, rounds))
        table(["d", "metrics", "exact / auto, time", "difference of the entropy"], rows)


def accuracy(width: int, draws: int, quick: bool) -> Iterator[list[str]]:
    for name, values in spectra(width, quick=quick):
        exact = torch.special.entr(values).sum()
        found = estimates([of_diagonal(values, seed, STEPS) for seed in range(draws)], width)
        shares = estimates([of_diagonal(values, seed, STEPS_FOR_DIRECTIONS) for seed in range(draws // 10 or 1)], width)
        yield [f"{width:,}", name, *judged(found, exact), of_shares(shares, values)]
        if name.endswith("exponent 1") and (quick or width == 2048):
            basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
            matrix = ((basis * values) @ basis.T).float()
            found = estimates([project([matrix], seed=seed) for seed in range(draws)], width)
            yield [f"{width:,}", f"{name}, in random directions", *judged(found, exact), ""]


def of_diagonal(values: Tensor, seed: int, steps: int) -> Projection:
    diagonal = values.float().unsqueeze(1)
    probes = normal(len(values), BLOCK, seed, diagonal)
    return krylov(lambda block: diagonal * block, probes, values.square().sum(), steps)


def judged(found: Estimate, exact: Tensor) -> list[str]:
    errors = (found.entropy - exact).abs()
    worst = (errors.max() / exact).item()
    true = (errors <= 3 * found.error).double().mean().item()
    return [
        f"{exact.item():.3f}",
        str(len(errors)),
        f"{worst:.3%}",
        f"{(found.error.mean() / exact).item():.3%}",
        f"{true:.0%}",
        "yes" if worst <= BOUND and true >= HELD else "**no**",
    ]


def of_shares(found: Estimate, values: Tensor) -> str:
    exact, estimated = values.cumsum(0), found.top.cumsum(-1)
    return f"{max((estimated[:, k - 1] / exact[k - 1] - 1).abs().max().item() for k in DIRECTIONS):.3%}"


def times(width: int, rounds: int) -> Iterator[list[str]]:
    """Measure all that follows the forward pass, in turn, with the same tokens, a few more than dimensions."""
    torch.manual_seed(0)
    tokens = torch.randn(1, width + width // 8, width) * torch.arange(1, width + 1).pow(-0.5)
    for name, metrics in METRICS.items():
        monitor = EntropyMonitor(identities(LAYERS), "*", metrics=metrics)
        with monitor:
            monitor.model(tokens)
        statistics, entropies = monitor._recording.accumulators, dict[str, float]()
        solvers: tuple[Solver, ...] = ("exact", "auto")

        def compute(solver: Solver, statistics: Any = statistics, metrics: Any = metrics, own: Any = entropies) -> None:
            readings = PendingReadings(statistics, metrics, solver=solver).result()
            own[solver] = math.log(readings.values["0"]["effective_rank"])

        with mock.patch.object(decomposition, "WIDE", 0):
            seconds = interleaved({solver: partial(compute, solver) for solver in solvers}, rounds=rounds)
        difference = abs(entropies["auto"] / entropies["exact"] - 1)
        yield [f"{width:,}", name, str(ratio(seconds["exact"], seconds["auto"])), f"{difference:.3%}"]


if __name__ == "__main__":
    main()
