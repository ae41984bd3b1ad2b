"""An approximate solver / the exact one, for wide covariances.

The top k directions by a randomised subspace (Halko et al. 2011); what they leave by stochastic Lanczos quadrature
(Ubaru et al. 2017), all probes as one block, its result scaled to the trace that is left, which is known. The rule:
kept only if 5 times faster than `eigvalsh` at an error under 1 % of the entropy, everywhere. *Worst* is of 10 draws,
*estimate* the standard error that the probes show by themselves, the mean of those draws.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._report import begin, table
from benchmarks._timing import interleaved, ratio
from benchmarks._training import LENGTH, batches, make_model
from matent_callbacks.functional.entropy import entropy_of_eigenvalues

Solver = Callable[[Tensor], tuple[float, float]]
SPEED, ERROR = 5.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices: shows that it runs")
    quick = parser.parse_args().quick
    begin("Exact eigenvalues / an approximate solver", __doc__)
    settings = [(0, 16, 20), (32, 4, 6), (32, 16, 6), (64, 16, 4), (64, 16, 6), (64, 32, 6)]
    solvers: dict[str, Solver] = {
        f"k = {size}, {probes} probes, {steps} steps": functools.partial(
            approximate, size=size, probes=probes, steps=steps
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
        draws = [solver(covariance) for _ in range(10)]
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
    # Untrained, which is the hardest: its spectrum is the flattest.
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


def approximate(covariance: Tensor, *, size: int, probes: int, steps: int) -> tuple[float, float]:
    """Entropy of a unit-trace covariance, and its standard error."""
    basis = top_subspace(covariance, size)
    top = torch.linalg.eigvalsh(basis.T @ covariance @ basis).clamp(min=0)
    rest = (1 - top.sum()).clamp(min=0)
    left, deviation = lanczos(covariance, basis, probes, steps)
    return float(torch.special.entr(top).sum() + rest * left), float(rest * deviation)


def top_subspace(covariance: Tensor, size: int) -> Tensor:
    """An orthonormal basis of the top directions, after two passes."""
    basis = torch.randn(len(covariance), size)
    for _ in range(2 if size else 0):
        basis = torch.linalg.qr(covariance @ basis)[0]
    return basis


def lanczos(covariance: Tensor, basis: Tensor, probes: int, steps: int) -> tuple[Tensor, Tensor]:
    """Trace of -x log x of the covariance outside ``basis``, by that of x, and its standard error."""

    def outside(block: Tensor) -> Tensor:
        return block - basis @ (basis.T @ block)

    width = len(covariance)
    v = outside(torch.randn(width, probes).sign())
    v = v / v.norm(dim=0)
    kept = v.unsqueeze(0)
    alphas, betas = [], []
    for _ in range(steps):
        w = outside(covariance @ kept[-1])
        alphas.append((w * kept[-1]).sum(0))
        # Against all before: float32 loses orthogonality within a few steps.
        w = w - ((kept * w).sum(1, keepdim=True) * kept).sum(0)
        betas.append(w.norm(dim=0))
        kept = torch.cat([kept, (w / betas[-1].clamp(min=1e-30)).unsqueeze(0)])
    tridiagonal = torch.diag_embed(torch.stack(alphas, -1))
    off = torch.stack(betas[:-1], -1)
    tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal.double())
    weights, nodes = vectors[:, 0].square(), nodes.clamp(min=0)
    # The estimate of the trace errs alike, so that the ratio errs less; the trace itself is known.
    entropy, trace = (weights * torch.special.entr(nodes)).sum(-1), (weights * nodes).sum(-1)
    found = entropy.mean() / trace.mean()
    return found, (entropy - found * trace).std() / trace.mean() / math.sqrt(probes)


if __name__ == "__main__":
    main()
