"""Ours / the alternatives for the same step: by hand, or with the monitor of W&B.

*By hand* is `output_hidden_states=True`, then for each layer the covariance of the tokens that count, `eigvalsh` and
the entropy: the same values. `wandb.watch(model, log="all")` keeps histograms of parameters and gradients, offline,
every step here as ours is. One model takes a step with each in turn, except for `wandb.watch`, whose hooks stay on a
second one: two models differ by a percent or two just because of where their memory lies. *Time* is that of the whole
step over the other's whole step. *Extra* time and memory are what a step costs beyond a plain one, over the same of
the other. Memory is the peak of the forward or of the backward half of the step, whichever exceeds the plain one by
more: which of them limits a run depends on the run. Ours is that of all threads.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, mebibytes, peak_bytes, ratio
from benchmarks._workload import BATCH, LENGTH, batches, make_model
from matent_callbacks import EntropyMonitor

NAMES = {"by_hand": "`output_hidden_states=True` by hand", "watch": '`wandb.watch(log="all")`'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models and few steps: shows that it runs")
    quick = parser.parse_args().quick
    begin("Ours / the same by hand, and / W&B's monitor", __doc__)
    shapes = [(64, 2, 4)] if quick else [(256, 6, 30), (768, 4, 10)]  # width, blocks, rounds
    print(f"Llama, {BATCH} x {LENGTH} tokens a step, all layers. Goal: never above 1.\n")
    rows = [row for width, blocks, rounds in shapes for row in compare(width, blocks, rounds)]
    header = ["d", "ours /", "time", "extra time", "extra memory | ours | theirs | met"]
    table(header, rows)


def compare(width: int, blocks: int, rounds: int) -> list[list[str]]:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    import wandb

    with tempfile.TemporaryDirectory() as folder, wandb.init(project="benchmarks", dir=folder) as run:
        steps = Steps(width, blocks, run)
        kinds = ("plain", "ours", *NAMES)
        seconds = interleaved({name: functools.partial(steps, name) for name in kinds}, rounds=rounds)
        halves = {name: steps.peaks(name) for name in kinds}
    extra = {
        name: statistics.median(own - plain for own, plain in zip(values, seconds["plain"], strict=True))
        for name, values in seconds.items()
    }
    memory = {
        name: max(0, *(own - plain for own, plain in zip(peaks, halves["plain"], strict=True)))
        for name, peaks in halves.items()
    }
    rows = []
    for name, title in NAMES.items():
        whole = ratio(seconds["ours"], seconds[name])
        met = whole.median <= 1 and memory["ours"] <= memory[name]
        rows.append(
            [
                f"{width}, {blocks} blocks",
                title,
                str(whole),
                f"{extra['ours'] / extra[name]:.2f}",
                f"{memory['ours'] / memory[name]:.2f}" if memory[name] > 0 else "-",
                mebibytes(memory["ours"]),
                mebibytes(memory[name]),
                "yes" if met else "**no**",
            ]
        )
    return rows


class Training:
    """A model, its optimizer and its data."""

    def __init__(self, width: int, blocks: int) -> None:
        self.model = make_model(width, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.data = batches()


class Steps:
    """Training steps, plain or monitored, with the values of the step in the W&B run."""

    def __init__(self, width: int, blocks: int, run: Any) -> None:
        self._width = width
        self._common, self._watched = Training(width, blocks), Training(width, blocks)
        self._monitor = EntropyMonitor(self._common.model, "all")
        self._run = run
        run.watch(self._watched.model, log="all", log_freq=1)

    def __call__(self, name: str) -> None:
        loss, values = self._forward(name)
        self._backward(name, loss, values)

    def peaks(self, name: str) -> tuple[int, int]:
        """Peak bytes of both halves of a step."""
        found: list[tuple[Tensor, dict[str, float]]] = []
        forward = peak_bytes(lambda: found.append(self._forward(name)))
        if name == "ours":
            # One thread was measured. Each of the others decomposes a matrix of its own, and LAPACK has a copy of it.
            forward += (torch.get_num_threads() - 1) * 2 * 4 * self._width**2
        return forward, peak_bytes(lambda: self._backward(name, *found[0]))

    def _training(self, name: str) -> Training:
        return self._watched if name == "watch" else self._common

    def _forward(self, name: str) -> tuple[Tensor, dict[str, float]]:
        training = self._training(name)
        batch = next(training.data)
        if name == "ours":
            with self._monitor:
                output = training.model(**batch)
            return output.loss, self._monitor.compute()
        output = training.model(**batch, output_hidden_states=name == "by_hand")
        return output.loss, by_hand(output.hidden_states, batch["attention_mask"]) if name == "by_hand" else {}

    def _backward(self, name: str, loss: Tensor, values: dict[str, float]) -> None:
        optimizer = self._training(name).optimizer
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        self._run.log({"loss": loss.item(), **values})


@torch.no_grad()
def by_hand(hidden_states: tuple[Tensor, ...], attention_mask: Tensor) -> dict[str, float]:
    """Entropy and effective rank of the covariance of all tokens that count, layer by layer."""
    values: dict[str, float] = {}
    mask = attention_mask.unsqueeze(-1).float()
    count = mask.sum(1, keepdim=True)
    for number, hidden in enumerate(hidden_states):
        mean = (hidden.float() * mask).sum(1, keepdim=True) / count
        centred = (hidden.float() - mean) * mask
        z = (centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)).flatten(0, 1)
        covariance = z.T @ z
        eigenvalues = torch.linalg.eigvalsh(covariance / covariance.trace()).clamp(min=0)
        entropy = torch.special.entr(eigenvalues).sum()
        values |= {f"matrix_entropy/{number}": entropy.item(), f"effective_rank/{number}": entropy.exp().item()}
    return values


if __name__ == "__main__":
    main()
