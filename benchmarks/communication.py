"""What ranks send each other, and the memory that this takes: ours / torchmetrics' default.

*Torchmetrics* is a metric with the same statistics (a count, a mean, a d x d sum) and `dist_reduce_fx="sum"`. Real
processes over gloo. *State* is how many numbers a metric keeps between updates. *Numbers* is what a rank hands to the
collectives, per layer; *received* is what reaches a rank in a ring: 2 (W - 1) / W of it for an all-reduce, W - 1 times
it for an all-gather. *Peak memory* is that of a synchronisation, beyond the state. *Monitor* is `EntropyMonitor` with
all its layers, one reading; its limit is d(d + 1)/2 + O(d) numbers a layer.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from benchmarks._markdown import begin, table
from benchmarks._stack import identities
from benchmarks._timing import interleaved, mebibytes, peak_bytes, ratio
from matent_callbacks import EntropyMonitor, MatrixEntropy
from tests.ranks import run_on_ranks

# How much a rank receives for each number that it passes to a collective, by the world size.
RECEIVED: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda world: 2 * (world - 1) / world,
    "reduce": lambda world: (world - 1) / world,
    "broadcast": lambda world: (world - 1) / world,
    "reduce_scatter": lambda world: (world - 1) / world,
    "reduce_scatter_tensor": lambda world: (world - 1) / world,
    "all_to_all": lambda world: (world - 1) / world,
    "all_to_all_single": lambda world: (world - 1) / world,
    "all_gather": lambda world: world - 1,
    "all_gather_into_tensor": lambda world: world - 1,
    "gather": lambda world: world - 1,
}
OUTPUT_FIRST = ("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all")
LAYERS = 4


class SummedMoments(Metric):
    """The same statistics, reduced by torchmetrics."""

    num_tokens: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("mean", torch.zeros(width), dist_reduce_fx="sum")
        self.add_state("scatter", torch.zeros(width, width), dist_reduce_fx="sum")

    def update(self, hidden: Tensor) -> None:
        z = hidden.flatten(0, 1)
        self.num_tokens += len(z)
        self.mean += z.sum(0)
        self.scatter += z.T @ z

    def compute(self) -> Tensor:
        return self.scatter.diagonal().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small widths: shows that it runs")
    quick = parser.parse_args().quick
    begin("Communication, ours / torchmetrics' default", __doc__)
    widths = (32, 64) if quick else (256, 1024)
    rows: list[list[str]] = []
    monitors: list[list[str]] = []
    for world in (2, 4):
        ranks = run_on_ranks(on_rank, world, widths, 3 if quick else 9, seconds=300)
        for number, width in enumerate(widths):
            results = [rank[number] for rank in ranks]
            rows.append(metric_row(width, world, results))
            monitors.append(monitor_row(width, world, results))
    rows += [formula(width, 64) for width in widths]
    header = ["d", "world size", "state, ours / theirs", "numbers", "numbers, ours / theirs", "received"]
    table([*header, "peak memory of a rank", "time"], rows)
    print("World size 64 is by the formula; its memory is what torchmetrics sets aside, what is sent and gathered.\n")
    header = ["d", "world size", "monitor: numbers a layer, most of any rank", "/ d(d+1)/2", "met", "its collectives"]
    table(header, monitors)


def metric_row(width: int, world: int, results: list[dict[str, Any]]) -> list[str]:
    worst = max(results, key=lambda result: int(result["ours"][0]))
    (sent, received, peak), (their_sent, their_received, their_peak) = worst["ours"], worst["theirs"]
    return [
        str(width),
        str(world),
        f"{worst['state'][0] / worst['state'][1]:.3f}",
        f"{sent} = d(d+1)/2 + {sent - width * (width + 1) // 2}",
        f"{sent / their_sent:.3f}",
        f"{received / their_received:.3f}",
        f"{mebibytes(peak)} / {mebibytes(their_peak)} = {peak / their_peak:.2f}",
        worst["time"],
    ]


def monitor_row(width: int, world: int, results: list[dict[str, Any]]) -> list[str]:
    half = width * (width + 1) // 2
    most = max(result["monitor"] for result in results) / LAYERS
    met = "yes" if most <= half + 16 * width else "**no**"
    calls = ", ".join(f"{count} {name}" for name, count in sorted(results[0]["calls"].items()))
    return [str(width), str(world), f"{most:.0f}", f"{most / half:.3f}", met, calls]


def formula(width: int, world: int) -> list[str]:
    half, full = width * (width + 1) / 2, width**2
    received = 2 * (world - 1) / world * half / ((world - 1) * full)
    return [
        str(width),
        f"{world} (formula)",
        f"{half / full:.3f}",
        "d(d+1)/2 + O(d)",
        f"{half / full:.3f}",
        f"{received:.4f}",
        f"{4 / 2**20 * (half + half):.1f} MiB / {4 / 2**20 * 2 * world * full:.1f} MiB",
        "",
    ]


def on_rank(rank: int, world: int, widths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    return [of_width(rank, width, rounds) for width in widths]


def of_width(rank: int, width: int, rounds: int) -> dict[str, Any]:
    """Measure both ways: numbers sent and received, peak bytes, state, time; and what the monitor sends."""
    torch.manual_seed(rank)
    hidden = torch.randn(8, 128, width)
    metrics: dict[str, Metric] = {"ours": MatrixEntropy(num_features=width), "theirs": SummedMoments(width)}
    for metric in metrics.values():
        metric.update(hidden)
    states = [sum(torch.as_tensor(own).numel() for own in metric.metric_state.values()) for metric in metrics.values()]

    def sync(name: str) -> None:
        metrics[name].sync()
        metrics[name].unsync()

    ways = {name: functools.partial(sync, name) for name in metrics}
    # Every rank draws the same order.
    seconds = interleaved(ways, rounds=rounds)
    found: dict[str, Any] = {name: (*traffic(way)[:2], peak_bytes(way)) for name, way in ways.items()}

    model = identities(LAYERS)
    monitor = EntropyMonitor(model, "*")
    with monitor:
        model(hidden)
    sent, _, calls = traffic(monitor.compute)
    times = str(ratio(seconds["ours"], seconds["theirs"]))
    return {**found, "state": states, "time": times, "monitor": sent, "calls": calls}


def traffic(function: Callable[[], Any]) -> tuple[int, float, Counter[str]]:
    """Count the numbers that this rank passes to collectives in a call, those that it receives, and calls by name."""
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    with _listening(sent, calls):
        function()
    world = dist.get_world_size()
    return sum(sent.values()), sum(RECEIVED[name](world) * count for name, count in sent.items()), calls


@contextmanager
def _listening(sent: Counter[str], calls: Counter[str]) -> Iterator[None]:
    originals = {name: getattr(dist, name) for name in RECEIVED}

    def listener(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            own = args[1 if name in OUTPUT_FIRST else 0] if args else next(iter(kwargs.values()))
            sent[name] += sum(t.numel() for t in own) if isinstance(own, list | tuple) else own.numel()
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, listener(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


if __name__ == "__main__":
    main()
