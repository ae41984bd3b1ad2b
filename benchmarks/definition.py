"""The paper's procedure, sentence by sentence, and the two routes to its spectrum.

*Ours* is `SequenceMatrixEntropy` on the same sentences; *the paper's* is a full SVD of the d x d covariance of each
sentence. Below, the two matrices that have the non-zero eigenvalues, d x d (covariance) and T x T (Gram), on both
sides of T = d, and what the automatic choice costs beside the better of them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, ratio
from matent_callbacks import SequenceMatrixEntropy
from matent_callbacks.functional import spectrum

SIDES = (1 / 4, 1 / 2, 3 / 4, 1.0, 4 / 3, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs")
    quick = parser.parse_args().quick
    begin("Ours / the paper's procedure", __doc__)
    torch.manual_seed(0)
    widths, lengths = ((32, 64), (16, 64, 128)) if quick else ((256, 512, 1024, 2048), (64, 256, 512, 1024, 2048))
    rows = [[f"{length}", *(against_paper(length, width, quick) for width in widths)] for length in lengths]
    table(["T \\ d", *map(str, widths)], rows)

    rows = []
    for width in (64,) if quick else (256, 768):
        for side in SIDES:
            length = round(side * width)
            gram, choice = routes(length, width)
            rows.append([str(width), str(length), f"{side:.2f}", gram, choice])
    table(["d", "T", "T / d", "Gram / covariance", "automatic / better of the two"], rows)


def against_paper(length: int, width: int, quick: bool) -> str:
    # An SVD of a wide covariance takes seconds.
    sentences, rounds = (2, 2) if quick else (8, 7) if width <= 512 else (4, 5) if width <= 1024 else (1, 3)
    hidden = torch.randn(sentences, length, width)

    def ours() -> None:
        metric = SequenceMatrixEntropy()
        metric.update(hidden)
        metric.compute().item()

    seconds = interleaved({"ours": ours, "paper": lambda: paper(hidden)}, rounds=rounds)
    found = ratio(seconds["ours"], seconds["paper"])
    return f"{found.median:.4f} (1/{1 / found.median:.0f})"


def paper(hidden: Tensor) -> list[float]:
    """One entropy per sentence, as the authors compute it."""
    entropies = []
    for z in hidden:
        centred = z - z.mean(0)
        normalized = centred / centred.norm(dim=1, keepdim=True)
        covariance = normalized.T @ normalized / z.shape[0]
        values = torch.linalg.svd(covariance / covariance.trace())[1]
        entropies.append(torch.special.entr(values).sum().item())
    return entropies


def routes(length: int, width: int) -> tuple[str, str]:
    z = torch.randn(4, length, width)
    z = z - z.mean(1, keepdim=True)
    z = z / z.norm(dim=-1, keepdim=True)
    functions = {
        "gram": lambda: torch.linalg.eigvalsh(z @ z.mT),
        "covariance": lambda: torch.linalg.eigvalsh(z.mT @ z),
        "automatic": lambda: spectrum(z),
    }
    seconds = interleaved(functions, rounds=7)
    best = [min(pair) for pair in zip(seconds["gram"], seconds["covariance"], strict=True)]
    return str(ratio(seconds["gram"], seconds["covariance"])), str(ratio(seconds["automatic"], best))


if __name__ == "__main__":
    main()
