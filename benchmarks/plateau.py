"""How often and how late early stopping stops: `PlateauDetector` beside Lightning's and Hugging Face's own classes.

All get the same simulated series with the same patience and `min_delta` = 1 (mode "max"). A series rises by 1.5 to 3
per `patience` observations for 10 patience, with Gaussian noise of standard deviation 0.15 to 0.5 (both drawn per
series), then it is flat for 6 patience, unless its case says otherwise. Spikes: 2 % of the points are off by 5 to 10,
up or down. Missing: 10 % are NaN.

A stop during the rise is false, none by the end is a miss. Delays are counted in finite observations of the plateau.
Lightning runs with `check_finite=False`, as it otherwise stops at the first NaN. Hugging Face runs with the `Trainer`'s
own bookkeeping of the best metric, which any improvement moves, so its threshold has to be exceeded in one evaluation;
hence it is shown with its default threshold of 0, too (with which Lightning decides alike).
"""

import argparse
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from numpy.typing import NDArray
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from matent_callbacks import PlateauDetector

PATIENCES = (5, 10, 20)
RISE, PLATEAU = 10, 6  # lengths in patience


class Case(NamedTuple):
    """A kind of series: the length of its rise in patience, the ranges it is drawn from, and its disturbances."""

    name: str
    rise: int = RISE
    slope: tuple[float, float] = (1.5, 3.0)
    noise: tuple[float, float] = (0.15, 0.5)
    spikes: float = 0.0
    missing: float = 0.0
    correlation: float = 0.0
    creep: float = 0.0


def cases() -> Iterator[Case]:
    """Yields the cases in the order of the table."""
    for suffix, spikes, missing in (("", 0.0, 0.0), (", spikes", 0.02, 0.0), (", missing", 0.0, 0.1)):
        yield Case(f"rise, then plateau{suffix}", spikes=spikes, missing=missing)
        yield Case(f"flat{suffix}", rise=0, spikes=spikes, missing=missing)
        yield Case(f"falling{suffix}", rise=0, slope=(-3.0, -1.5), spikes=spikes, missing=missing)
    yield Case("slowest rise (1.5), most noise (0.5)", slope=(1.5, 1.5), noise=(0.5, 0.5))
    yield Case("fastest rise (3), most noise (0.5)", slope=(3.0, 3.0), noise=(0.5, 0.5))
    yield Case("plateau that creeps up by 0.3 per patience", creep=0.3)
    yield Case("noise of 1 to 2", noise=(1.0, 2.0))
    yield Case("correlated noise (AR(1), 0.5)", correlation=0.5)


def simulate(case: Case, patience: int, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns `count` series as rows."""
    steps = np.arange((case.rise + PLATEAU) * patience)
    slope = rng.uniform(*case.slope, (count, 1)) / patience
    shape = count, len(steps)
    noise = rng.standard_normal(shape)
    for step in steps[1:]:  # stationary: the standard deviation stays 1
        noise[:, step] *= np.sqrt(1 - case.correlation**2)
        noise[:, step] += case.correlation * noise[:, step - 1]
    end = case.rise * patience
    level = np.where(slope > 0, slope * np.minimum(steps, end), slope * steps)
    level += case.creep / patience * np.maximum(0, steps - end)
    values = level + rng.uniform(*case.noise, (count, 1)) * noise
    values += (rng.random(shape) < case.spikes) * rng.uniform(5, 10, shape) * rng.choice([-1, 1], shape)
    values[rng.random(shape) < case.missing] = np.nan
    return values


def ours(patience: int) -> Callable[[int, float], bool]:
    """Returns the stopping rule of this package."""
    return PlateauDetector(min_delta=1.0, patience=patience).update


def lightning(patience: int) -> Callable[[int, float], bool]:
    """Returns the stopping rule of Lightning."""
    callback = EarlyStopping("value", min_delta=1.0, patience=patience, mode="max", check_finite=False)
    return lambda step, value: bool(callback._evaluate_stopping_criteria(torch.tensor(value))[0])


def hugging_face(patience: int, threshold: float = 1.0) -> Callable[[int, float], bool]:
    """Returns the stopping rule of Hugging Face, in the order in which the `Trainer` evaluates."""
    callback: Any = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(metric_for_best_model="value", greater_is_better=True, save_strategy=SaveStrategy.STEPS)
    state, control = TrainerState(), TrainerControl()
    trainer: Any = SimpleNamespace(args=args, state=state)

    def update(step: int, value: float) -> bool:
        metrics = {"eval_value": value}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        return bool(control.should_training_stop)

    return update


METHODS: dict[str, Callable[[int], Callable[[int, float], bool]]] = {
    "ours": ours,
    "Lightning": lightning,
    "Hugging Face": hugging_face,
    "Hugging Face, threshold 0": lambda patience: hugging_face(patience, 0.0),
}


def score(case: Case, method: str, patience: int, series: NDArray[np.float64]) -> tuple[str, str, str]:
    """Returns the percentage of false stops, the median delay in patience, and the percentage of misses, as text."""
    # The last value of the rise has still risen; without a rise the first value belongs to the plateau.
    start = case.rise * patience + 1 if case.rise else 0
    false, missed = 0, 0
    delays = []
    for values in series:
        update = METHODS[method](patience)
        stop = next((step for step, value in enumerate(values.tolist()) if update(step, value)), None)
        if stop is None:
            missed += 1
        elif stop < start:
            false += 1
        else:
            delays.append(np.isfinite(values[start : stop + 1]).sum() / patience)
    delay = f"{np.median(delays):.2f}" if delays else "-"
    return f"{100 * false / len(series):.1f}", delay, f"{100 * missed / len(series):.1f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000, help="series per case and patience (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    print(f"{options.series} series per case and patience; patience {' / '.join(map(str, PATIENCES))}\n")
    print("| case | method | false stops % | median delay (in patience) | misses % |")
    print("|---|---|---:|---:|---:|")
    for number, case in enumerate(cases()):
        rng = np.random.default_rng([options.seed, number])
        series = {patience: simulate(case, patience, options.series, rng) for patience in PATIENCES}
        for method in METHODS:
            scores = [score(case, method, patience, series[patience]) for patience in PATIENCES]
            false, delay, missed = (" / ".join(column) for column in zip(*scores, strict=True))
            print(f"| {case.name} | {method} | {false if case.rise else '-'} | {delay} | {missed} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
