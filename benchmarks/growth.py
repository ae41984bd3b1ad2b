"""How a reading grows with tokens, width, layers and ranks.

`EntropyMonitor` on layers that do nothing: all the time and memory are the monitor's. Times are relative to the
leftmost point of their curve, all points measured in turn; memory is the peak during a reading on one thread: each
further thread needs two copies of a layer's matrix. The grey lines have slopes of 1, 2 and 3 on the logarithmic axes.
Over tokens memory is flat as soon as a batch has more numbers than are processed at a time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks._markdown import PLOTS, begin, table
from benchmarks._stack import identities
from benchmarks._timing import interleaved, peak_bytes, ratio
from matent_callbacks import EntropyMonitor
from matent_callbacks.plot._style import BLUE, ORANGE
from tests.ranks import run_on_ranks


class Shape(NamedTuple):
    """The shape of one reading."""

    tokens: int = 1024
    width: int = 512
    layers: int = 4


class Curve(NamedTuple):
    """Time and memory along one axis."""

    axis: str
    points: list[int]
    time: list[float]
    memory: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs")
    quick = parser.parse_args().quick
    begin("Growth", __doc__)
    base = Shape(128, 32, 2) if quick else Shape()
    rounds = 3 if quick else 9
    axes: dict[str, list[int]] = {
        "tokens": [
            base.tokens * factor // 4 for factor in ((1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256))
        ],
        "width": [base.width * factor // 4 for factor in ((1, 4) if quick else (1, 2, 4, 8, 16))],
        "layers": [1, 2, 4, 8, 16],
    }
    curves = [curve(axis, points, base, rounds) for axis, points in axes.items()]
    curves.append(over_ranks([1, 2] if quick else [1, 2, 4], base, rounds))
    print(f"Where it is not the axis: {base.tokens} tokens, d = {base.width}, {base.layers} layers, 1 rank.\n")
    rows = [
        [c.axis, str(point), f"{time:.2f}", f"{memory / 2**20:.2f}"]
        for c in curves
        for point, time, memory in zip(c.points, c.time, c.memory, strict=True)
    ]
    draw(curves)
    print("![Time and memory of a reading against tokens, width, layers and ranks](plots/growth.png)\n")
    table(["axis", "", "time / leftmost", "peak memory, MiB"], rows)


def curve(axis: str, points: list[int], base: Shape, rounds: int) -> Curve:
    readings = {str(point): reading(base._replace(**{axis: point})) for point in points}
    seconds = interleaved(readings, rounds=rounds)
    time = [ratio(seconds[str(point)], seconds[str(points[0])]).median for point in points]
    return Curve(axis, points, time, [float(peak_bytes(readings[str(point)])) for point in points])


def reading(shape: Shape) -> Callable[[], Any]:
    """Return a function that reads one forward and computes the values of all its layers."""
    length = min(128, shape.tokens)
    hidden = torch.randn(shape.tokens // length, length, shape.width)
    model = identities(shape.layers)
    monitor = EntropyMonitor(model, "*")

    def read() -> None:
        with monitor:
            model(hidden)
        monitor.compute()

    return read


def over_ranks(worlds: list[int], base: Shape, rounds: int) -> Curve:
    """Measure with the same tokens on every rank. The ranks share this machine's cores, so many ranks are slower."""
    time, memory = [], []
    for world in worlds:
        found = run_on_ranks(on_rank, world, tuple(base), rounds, seconds=240)
        time.append(statistics.median(seconds for seconds, _ in found))
        memory.append(float(max(peak for _, peak in found)))
    return Curve("ranks", worlds, [value / time[0] for value in time], memory)


def on_rank(rank: int, world: int, shape: tuple[int, int, int], rounds: int) -> tuple[float, int]:
    """Time a reading relative to a matrix product, which cancels the machine's load; also return its peak bytes."""
    torch.manual_seed(rank)
    read = reading(Shape(*shape))
    square = torch.randn(shape[1], shape[1])
    seconds = interleaved({"read": read, "product": lambda: square @ square}, rounds=rounds)
    return ratio(seconds["read"], seconds["product"]).median, peak_bytes(read)


def draw(curves: list[Curve]) -> None:
    """Two rows of small plots: time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(curves), figsize=(11, 5), layout="constrained", sharex="col")
    for column, own in zip(axes.T, curves, strict=True):
        for ax, values, colour in zip(column, (own.time, [m / 2**20 for m in own.memory]), (BLUE, ORANGE), strict=True):
            ax.loglog(own.points, values, color=colour, marker="o", base=2)
            for slope in (1, 2, 3):
                ends = [own.points[0], own.points[-1]]
                ax.plot(
                    ends, [values[0] * (end / ends[0]) ** slope for end in ends], color="0.85", linewidth=1, zorder=0
                )
            ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
            ticks = own.points[:: 2 if len(own.points) > 6 else 1]
            ax.set_xticks(ticks, [str(point) for point in ticks])
            ax.minorticks_off()
        column[1].set_xlabel({"width": "d"}.get(own.axis, own.axis))
    axes[0, 0].set_ylabel("time / leftmost")
    axes[1, 0].set_ylabel("peak memory (MiB)")
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
