"""An approximate solver / the exact one, for wide covariances.

The top k directions by a randomised subspace (Halko et al. 2011); what they leave by stochastic Lanczos quadrature
(Ubaru et al. 2017), all probes as one block, its result scaled to the trace that is left, which is known. The rule:
kept only if 5 times faster than `eigvalsh` at an error under 1 % of the entropy, everywhere. *Worst* is of 10 draws,
*estimate* the standard error that the probes show by themselves, the mean of those draws. `solver="approximate"` is
k = 64, 16 probes, 4 steps, from d = 1024 on.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, ratio
from benchmarks._workload import LENGTH, batches, make_model
from matent_callbacks.functional._estimate import estimate_entropy
from matent_callbacks.functional.entropy import entropy_of_eigenvalues

Solver = Callable[..., tuple[Tensor, Tensor]]
SPEED, ERROR = 5.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices: shows that it runs")
    quick = parser.parse_args().quick
    begin("Exact eigenvalues / an approximate solver", __doc__)
    settings = [(0, 16, 20), (32, 4, 6), (32, 16, 6), (64, 16, 4), (64, 16, 6), (64, 32, 6)]
    solvers: dict[str, Solver] = {
        f"k = {size}, {probes} probes, {steps} steps": functools.partial(
            estimate_entropy, size=size, probes=probes, steps=steps
        )
        for size, probes, steps in settings
    }
    rows = []
    for width in (128,) if quick else (1024, 2048, 4096):
        for name, covariance in matrices(width, quick):
            rows += judge(width, name, covariance, solvers, rounds=3 if quick or width < 4096 else 1)
    table(
        ["d", "spectrum", "solver", "exact / it, time", "worst error, nats", "estimate", "of the entropy", "met"], rows
    )
    batched(64 if quick else 1024)


def batched(width: int) -> None:
    """Print what one call for four matrices saves."""
    four = torch.stack([power_law(width, 1.0)] * 4)
    ways: dict[str, Callable[[], object]] = {
        "batched": functools.partial(torch.linalg.eigvalsh, four),
        "single": lambda: [torch.linalg.eigvalsh(matrix) for matrix in four],
    }
    seconds = interleaved(ways, rounds=5)
    print(f"Four of d = {width} in one `eigvalsh` / one by one: {ratio(seconds['batched'], seconds['single'])}.\n")


def judge(width: int, name: str, covariance: Tensor, solvers: dict[str, Solver], *, rounds: int) -> list[list[str]]:
    exact = float(entropy_of_eigenvalues(torch.linalg.eigvalsh(covariance).clamp(min=0)))
    ways: dict[str, Callable[[], object]] = {"exact": functools.partial(torch.linalg.eigvalsh, covariance)}
    ways |= {title: functools.partial(solver, covariance) for title, solver in solvers.items()}
    seconds = interleaved(ways, rounds=rounds, warm_up=0)
    rows = []
    for title, solver in solvers.items():
        faster = ratio(seconds["exact"], seconds[title]).median
        draws = [tuple(map(float, solver(covariance, seed=seed))) for seed in range(10)]
        error = max(abs(entropy - exact) for entropy, _ in draws)
        estimate = statistics.mean(deviation for _, deviation in draws)
        kept = "yes" if faster >= SPEED and error < ERROR * exact else "no"
        rows.append(
            [
                str(width),
                name,
                title,
                f"{faster:.1f}",
                f"{error:.4f}",
                f"{estimate:.4f}",
                f"{100 * error / exact:.2f} %",
                kept,
            ]
        )
    return rows


def matrices(width: int, quick: bool) -> list[tuple[str, Tensor]]:
    """Unit-trace covariances: with given spectra in random directions, and of the hidden states of a network."""
    torch.manual_seed(0)
    found = [(f"power law, exponent {slope:g}", power_law(width, slope)) for slope in (1.0, 1.5)]
    # Nothing to deflate, and two levels far apart.
    found.append(
        (
            "d/8 directions with 90 %",
            rotated(torch.cat([torch.full((width // 8,), 63.0), torch.ones(width - width // 8)])),
        )
    )
    # An untrained model, which is the hardest: its spectrum is the flattest.
    model = make_model(width, 1 if quick or width > 2048 else 2)
    data = batches()
    with torch.no_grad():
        count = max(2, math.ceil(2 * width / LENGTH / 8))
        hidden = torch.cat([model.model(next(data)["input_ids"]).last_hidden_state for _ in range(count)])
    z = hidden - hidden.mean(1, keepdim=True)
    z = (z / z.norm(dim=-1, keepdim=True)).flatten(0, 1)
    return [*found, ("hidden states", z.T @ z / len(z))]


def power_law(width: int, slope: float) -> Tensor:
    return rotated(torch.arange(1, width + 1).pow(-slope))


def rotated(values: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    return torch.mm(basis * (values / values.sum()), basis.T)


if __name__ == "__main__":
    main()
