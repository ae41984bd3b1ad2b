"""On a GPU: what a measured step costs, by part.

A Llama in bfloat16 whose parameters take plain gradient steps, of 4 x 1,024 tokens, all layers measured. *Step* is a
measured step over a plain one: four steps of which one is measured, against four plain ones, in turn in one process,
with the device waited for at the end; `background` has the other three to finish in. The parts of one measurement are
from torch's profile, in which they are called `matent_callbacks: accumulate`, `decompose` and `wait`: host time, and
in brackets that of the device. *Peak* is the memory of four steps with a measurement beyond that of plain ones.

`python -m benchmarks.gpu --device cpu --small` shows that it runs where there is no GPU. For a timeline run it under
`nsys profile` with `--nvtx`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile

from benchmarks._markdown import begin, table
from benchmarks._timing import mebibytes, peak_bytes, ratio
from benchmarks._workload import make_model
from matent_callbacks import LoopMonitor

STEPS = 4
PARTS = ("accumulate", "decompose", "wait")
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"solver": "exact"},
    "auto": {"solver": "auto"},
    "auto, `background=True`": {"solver": "auto", "background": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few tokens")
    parser.add_argument("--nvtx", action="store_true", help="mark the parts for Nsight Systems")
    parser.add_argument("--quick", action="store_true", help="the same as `--device cpu --small`")
    arguments = parser.parse_args()
    small = arguments.small or arguments.quick
    device = torch.device("cpu" if arguments.quick else arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU. `--device cpu --small` runs this on the CPU.")
    begin("On a GPU", __doc__)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}\n")
    with ExitStack() as around:
        warnings.simplefilter("ignore")
        if arguments.nvtx:
            around.enter_context(emit_nvtx())  # type: ignore[no-untyped-call]
        settings = [(64, 2)] if small else [(2048, 16), (4096, 8)]
        shape = (2, 64) if small else (4, 1024)
        rows = (row for width, blocks in settings for row in of_model(width, blocks, shape, device, 1 if small else 5))
        table(["d", "blocks", "way", "plain step, s", "step", *PARTS, "peak"], rows)


def of_model(width: int, blocks: int, shape: tuple[int, int], device: torch.device, rounds: int) -> Iterator[list[str]]:
    model = make_model(width, blocks, shape[1]).to(device, torch.bfloat16).train()
    ids = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(device)
    plain = Training(model, ids, None)
    plain.four_steps()
    for name, way in WAYS.items():
        measured = Training(model, ids, way)
        measured.four_steps()
        seconds = [[timed(own.four_steps, device) for own in (measured, plain)] for _ in range(rounds)]
        longer, shorter = zip(*seconds, strict=True)
        # All that four steps take longer was taken by the one that is measured.
        step = [1 + STEPS * (a - b) / b for a, b in zip(longer, shorter, strict=True)]
        extra = peak_of(measured.four_steps, device) - peak_of(plain.four_steps, device)
        each = f"{statistics.median(shorter) / STEPS:.3f}"
        cells = [str(ratio(step, [1.0] * rounds)), *parts(measured.four_steps, device), mebibytes(extra)]
        yield [f"{width:,}", str(blocks), name, each, *cells]


class Training:
    """Takes plain gradient steps, the first of four of them measured."""

    def __init__(self, model: Any, ids: torch.Tensor, way: dict[str, Any] | None) -> None:
        self._model, self._ids, self._way = model, ids, way

    def four_steps(self) -> None:
        if self._way is None:
            for _ in range(STEPS):
                self._step()
            return
        monitor = LoopMonitor(self._model, STEPS, "all", pictures=False, on_error="raise", **self._way)
        for number in range(STEPS, 2 * STEPS):
            with monitor.step(number, ends=True):
                self._step()
        monitor.close()

    def _step(self) -> None:
        loss = self._model(input_ids=self._ids, labels=self._ids).loss
        torch.autograd.backward(loss)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.sub_(parameter.grad, alpha=1e-4)
                parameter.grad = None


def timed(function: Callable[[], object], device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    function()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return peak_bytes(function)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    settle(device)
    return torch.cuda.max_memory_allocated(device)


def parts(function: Callable[[], object], device: torch.device) -> list[str]:
    """Return the seconds of each part of a measurement as cells of a table."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        function()
        settle(device)
    found = {event.key: event for event in profiler.key_averages()}
    cells = []
    for part in PARTS:
        event = found.get(f"matent_callbacks: {part}")
        # The profiler does not follow the thread in the background.
        host, own = (event.cpu_time_total, event.device_time_total) if event else (0.0, 0.0)
        cells.append(f"{host / 1e6:.3f} s ({own / 1e6:.3f} s)" if event else "in the background")
    return cells


if __name__ == "__main__":
    main()
