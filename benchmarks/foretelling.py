"""What the numbers foretell: of what is known at a tenth of a run, what goes with how the run ends.

**Fine-tuning.** SmolLM2-135M on one narrow text, the language reference of CPython, at four learning rates from timid
to far too high, with all weights and with LoRA, from five seeds: 40 runs of 60 steps. *Forgetting* is how much the
loss on news reports (the Lee corpus), which the run does not see, has risen at its end. *Best narrow loss* is the least
held-out loss on the narrow text, every 20 steps. **Image and text.** The LLaVA of `examples/finetune_vlm.py`, at three
learning rates from five seeds; *grounding* is what the right image is worth to it at the end.

The tables hold rank correlations (Spearman) over runs with an interval of 95 % (Bonett & Wright 2000); *at equal
learning rate* they are of ranks among the five seeds of a learning rate and method: what a quantity tells beyond the
setting, which is known before the run. Layers of a band are averaged. *Free* is the training loss or the norm of
gradients, whichever the quantity goes with more, and how much. Of 60 rows, 3 are outside of their intervals by chance.

The runs are in `foretelling.json`; without it, or with `--retrain`, they are trained (an hour or two on two cores).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks._forgetting import LEARNING_RATES, METRICS, Setting, finetune, settings
from benchmarks._markdown import begin, conditions, table
from benchmarks.stopping_alignment import spread
from benchmarks.stopping_alignment import train as train_alignment

RUNS = Path(__file__).parent / "foretelling.json"
STEPS, ALIGNMENT_STEPS = 60, 300
SEEDS = 5
ALIGNMENT_RATES = (3e-4, 1e-3, 3e-3)
MEASURES = (
    "grounding",
    "image_text_shift",
    "cka_debiased",
    "cka_z",
    "mutual_knn",
    "mutual_knn_z",
    "mir",
    "image_text",
    "image_reduction_ratio",
)
LAST = "last"
BANDS = {
    "embeddings to 8": ("layer_00", "layer_04", "layer_08"),
    "12 to 20": ("layer_12", "layer_16", "layer_20"),
    "24, 28": ("layer_24", "layer_28"),
    "last": (LAST,),
}
FREE = ("training_loss", "gradient_norm")
KNOWN = ("learning_rate", *FREE, "narrow_loss", "general_loss")

Run = dict[str, Any]


class Foretold(NamedTuple):
    """A rank correlation with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        text = f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"
        return text if self.low <= 0 <= self.high else f"**{text}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retrain", action="store_true", help="train, although there are runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, on one thread each")
    parser.add_argument("--quick", action="store_true", help="a few runs of a few steps: shows that it runs")
    arguments = parser.parse_args()
    begin("What the numbers foretell", __doc__)
    if arguments.quick:
        found: dict[str, Any] = {"finetuning": [], "alignment": []}
        few = ("--steps", "8", "--tower-steps", "2", "--every", "1")
        pairs = [(rate, 0) for rate in ALIGNMENT_RATES[:2]]
        train(found, settings(1)[1::3], pairs, few, steps=4, workers=arguments.workers)
    else:
        found = cached(retrain=arguments.retrain, workers=arguments.workers)
        print(f"Trained: {found['trained']}.\n")
    show_settings(found["finetuning"])
    show_finetuning(found["finetuning"])
    show_alignment(found["alignment"])


def cached(*, retrain: bool, workers: int) -> dict[str, Any]:
    """Return all runs and the conditions they were trained under; each is saved as soon as it is finished."""
    found: dict[str, Any] = {"trained": conditions("transformers", "peft"), "finetuning": [], "alignment": []}
    if RUNS.exists() and not retrain:
        found = json.loads(RUNS.read_text(encoding="utf-8"))

    def missing(kind: str, wanted: Sequence[Sequence[Any]], names: Sequence[str]) -> list[Sequence[Any]]:
        done = [[run[name] for name in names] for run in found[kind]]
        return [each for each in wanted if list(each) not in done]

    tuned = missing("finetuning", settings(SEEDS), Setting._fields)
    pairs = [(rate, seed) for seed in range(SEEDS) for rate in ALIGNMENT_RATES]
    aligned = missing("alignment", pairs, ("learning_rate", "seed"))
    options = ("--steps", str(ALIGNMENT_STEPS), "--every", str(ALIGNMENT_STEPS // 10))
    train(found, tuned, aligned, options, steps=STEPS, workers=workers, path=RUNS)
    return found


def train(
    found: dict[str, Any],
    tuned: Sequence[Sequence[Any]],
    aligned: Sequence[Sequence[Any]],
    options: Sequence[str],
    *,
    steps: int,
    workers: int,
    path: Path | None = None,
) -> None:
    """Add runs to those that were found, each as soon as it is finished, and write all to ``path``."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        kinds = {pool.submit(finetune, Setting(*each), steps=steps): "finetuning" for each in tuned}
        kinds |= {pool.submit(align, *each, *options): "alignment" for each in aligned}
        for future in concurrent.futures.as_completed(kinds):
            found[kinds[future]].append(future.result())
            if path is not None:
                path.write_text(json.dumps(found), encoding="utf-8")


def align(learning_rate: float, seed: int, *options: str) -> Run:
    """Run the example, and return what it logs at a tenth, and the grounding at its end."""
    keys = ["eval_loss", *(f"alignment/{name}" for name in MEASURES)]
    rate = ("--learning-rate", str(learning_rate), "--measures", *MEASURES[:-2])
    records = train_alignment(seed, *rate, *options, keys=keys)
    return {
        "learning_rate": learning_rate,
        "seed": seed,
        "early": records[0],
        "grounding": records[-1]["alignment/grounding"],
    }


def show_settings(runs: list[Run]) -> None:
    """Print what is known at a tenth and at the end for each method and learning rate: the median and the range."""
    early = {
        "training loss": "training_loss",
        "narrow loss": "narrow_loss",
        "`drift`, last": f"narrow/drift/{LAST}",
        "`effective_rank`, last": f"narrow/effective_rank/{LAST}",
    }
    cells = dict.fromkeys((run["method"], run["learning_rate"]) for run in runs)
    header = ["weights, learning rate", *(f"{name} at a tenth" for name in early), "forgetting", "best narrow loss"]

    def rows() -> Iterator[list[str]]:
        for method, rate in cells:
            own = [run for run in runs if (run["method"], run["learning_rate"]) == (method, rate)]
            found = [[run["early"][key] for run in own] for key in early.values()]
            found += [[run[name] for run in own] for name in ("forgetting", "best_narrow_loss")]
            yield [f"{method}, {rate:g}", *(spread(values, ".3g") for values in found)]

    table(header, rows())


def show_finetuning(runs: list[Run]) -> None:
    """Print what each quantity goes with, in all runs and at equal learning rate."""
    rows = {name.replace("_", " "): [{**run["early"], **run}[name] for run in runs] for name in KNOWN}
    # The methods take learning rates of different sizes: the least of each, the next, and so on.
    rows["learning rate"] = [float(LEARNING_RATES[run["method"]].index(run["learning_rate"])) for run in runs]
    for metric, probe, (band, layers) in itertools.product(METRICS, ("narrow", "general"), BANDS.items()):
        names = [f"{probe}/{metric}/{layer}" for layer in layers]
        of_band = [statistics.fmean(run["early"][name] for name in names) for run in runs]
        rows[f"`{metric}`, {probe} text, {band}"] = of_band
    cells = [(run["method"], run["learning_rate"]) for run in runs]
    ends = {name: [run[name] for run in runs] for name in ("forgetting", "best_narrow_loss")}
    free = {name.replace("_", " "): [run["early"][name] for run in runs] for name in FREE}
    header = ["known at a tenth", "forgetting", "at equal learning rate", "best narrow loss", "at equal learning rate"]
    table(
        [*header, "free"],
        ([name, *correlations(values, ends, cells), nearest(values, free)] for name, values in rows.items()),
    )


def show_alignment(runs: list[Run]) -> None:
    """Print what each quantity goes with."""
    ends = {"grounding": [run["grounding"] for run in runs]}
    cells = [run["learning_rate"] for run in runs]
    early = {key: [run["early"][key] for run in runs] for key in runs[0]["early"] if key != "step"}
    rows = {"learning rate": cells, "held-out loss": early.pop("eval_loss")}
    rows |= {f"`{key}`": values for key, values in early.items()}
    header = ["known at a tenth", "grounding at the end", "at equal learning rate"]
    table(header, ([name, *correlations(values, ends, cells)] for name, values in rows.items()))


def correlations(values: Sequence[float], ends: Mapping[str, Sequence[float]], cells: Sequence[Any]) -> list[str]:
    """Return for each end of the runs the correlation with it over all runs, and at equal settings."""
    return [str(each) for end in ends.values() for each in (spearman(values, end), spearman(values, end, cells))]


def nearest(values: Sequence[float], free: Mapping[str, Sequence[float]]) -> str:
    """Return which of the quantities that cost nothing goes with this one most."""
    name, found = max(((name, spearman(values, other).value) for name, other in free.items()), key=lambda c: abs(c[1]))
    return f"{found:+.2f} {name}"


def spearman(x: Sequence[float], y: Sequence[float], cells: Sequence[Any] | None = None) -> Foretold:
    """Correlate ranks over all runs, or over the runs of equal cells, whose ranks are about the mean of their cell."""
    cells = [0] * len(x) if cells is None else cells
    ranks: list[list[float]] = [[], []]
    for cell in dict.fromkeys(cells):
        for ranked, values in zip(ranks, (x, y), strict=True):
            own = stats.rankdata([value for value, other in zip(values, cells, strict=True) if other == cell])
            ranked += list(own - own.mean())
    size = len(x) - len(set(cells)) + 1
    if size < 4 or min(map(_spread, ranks)) == 0:
        return Foretold(math.nan, math.nan, math.nan)
    value = float(stats.pearsonr(*ranks).statistic)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + value**2 / 2) / (size - 3))
    middle = math.atanh(max(min(value, 1 - 1e-9), -1 + 1e-9))
    return Foretold(value, math.tanh(middle - half), math.tanh(middle + half))


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


if __name__ == "__main__":
    main()
