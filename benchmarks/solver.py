"""An approximate solver / the exact one, for wide covariances.

The top k directions by a randomised subspace (Halko et al. 2011); what they leave by stochastic Lanczos quadrature
(Ubaru et al. 2017), all probes as one block, its result scaled to the trace that is left, which is known. The rule:
kept only if 5 times faster than `eigvalsh` at an error under 1 % of the entropy, everywhere. *Worst* is of 10 draws.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._report import begin, table
from benchmarks._timing import interleaved, ratio
from benchmarks._training import LENGTH, batches, make_model
from matent_callbacks.functional.entropy import entropy_of_eigenvalues

Solver = Callable[[Tensor], Tensor]
SPEED, ERROR = 5.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices: shows that it runs")
    quick = parser.parse_args().quick
    begin("Exact eigenvalues / an approximate solver", __doc__)
    settings = [(0, 16, 20), (16, 4, 8), (32, 4, 10), (64, 4, 10), (64, 16, 12), (128, 8, 12)]
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
    table(["d", "spectrum", "solver", "exact / it, time", "worst error, nats", "of the entropy", "kept"], rows)


def judge(width: int, name: str, covariance: Tensor, solvers: dict[str, Solver], *, rounds: int) -> list[list[str]]:
    exact = float(entropy_of_eigenvalues(torch.linalg.eigvalsh(covariance).clamp(min=0)))
    seconds = interleaved(
        {
            "exact": functools.partial(torch.linalg.eigvalsh, covariance),
            **{title: functools.partial(solver, covariance) for title, solver in solvers.items()},
        },
        rounds=rounds,
        warm_up=0,
    )
    rows = []
    for title, solver in solvers.items():
        faster = ratio(seconds["exact"], seconds[title]).median
        error = max(abs(float(solver(covariance)) - exact) for _ in range(10))
        kept = "yes" if faster >= SPEED and error < ERROR * exact else "no"
        rows.append([str(width), name, title, f"{faster:.1f}", f"{error:.4f}", f"{100 * error / exact:.2f} %", kept])
    return rows


def matrices(width: int, quick: bool) -> list[tuple[str, Tensor]]:
    """Unit-trace covariances: two power laws in random directions, and the hidden states of a network."""
    torch.manual_seed(0)
    found = [(f"power law, exponent {slope:g}", power_law(width, slope)) for slope in (1.0, 1.5)]
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
    values = torch.arange(1, width + 1).pow(-slope)
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    return (basis * (values / values.sum())) @ basis.T


def approximate(covariance: Tensor, *, size: int, probes: int, steps: int) -> Tensor:
    """Entropy of a unit-trace covariance."""
    basis = top_subspace(covariance, size)
    top = torch.linalg.eigvalsh(basis.T @ covariance @ basis).clamp(min=0)
    rest = (1 - top.sum()).clamp(min=0)
    return torch.special.entr(top).sum() + lanczos(covariance, basis, probes, steps, rest)


def top_subspace(covariance: Tensor, size: int) -> Tensor:
    """An orthonormal basis of the top directions, after two passes."""
    basis = torch.randn(len(covariance), size)
    for _ in range(2 if size else 0):
        basis = torch.linalg.qr(covariance @ basis)[0]
    return basis


def lanczos(covariance: Tensor, basis: Tensor, probes: int, steps: int, trace: Tensor) -> Tensor:
    """Trace of -x log x of the covariance outside ``basis``, by quadrature scaled to the trace that is known."""

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
    # The weights' own estimate of the trace has the same errors, so its ratio has fewer.
    found = (weights * torch.special.entr(nodes)).sum(-1).mean() / (weights * nodes).sum(-1).mean()
    return trace * found.float()


if __name__ == "__main__":
    main()
