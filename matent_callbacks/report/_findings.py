"""Writes sentences on what changed during a run, from the readings alone."""

from __future__ import annotations

import itertools
from statistics import median

from matent_callbacks.accumulate.catalogue import SPECTRUM_TOP
from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.report._keys import LAYER_METRICS, Quantity
from matent_callbacks.report._pairs import pairs, stages
from matent_callbacks.report._run import Curve, Run
from matent_callbacks.report._settings import sinks_setting
from matent_callbacks.report._words import (
    PAIRS,
    capital,
    held_out_name,
    layers_only,
    listed,
    metric_name,
    named,
    number,
    place_name,
    step,
)

# With `logging_nan_inf_filter`, which is on by default.
ZERO = "Hugging Face's Trainer logs 0 where the loss is NaN"


def moved(name: str, curve: Curve) -> str:
    """Describe first and last reading, their difference, and lowest and highest value where those lie in between."""
    finite = curve.finite()
    bad = len(curve.values) - len(finite.values)
    broken = (
        f" {bad:,} of its {len(curve.values):,} readings {'is' if bad == 1 else 'are'} NaN or infinite." if bad else ""
    )
    name = capital(name)
    if not finite.values:
        return f"{name}: no reading is a finite number ({bad:,} {'is' if bad == 1 else 'are'} not)." if bad else ""
    steps, values = finite
    first, last = values[0], values[-1]
    if len(values) == 1:
        return f"{name}: {number(first)} at step {step(steps[0])}, the only reading.{broken}"
    if number(first) == number(last):
        change = f"is {number(first)} at step {step(steps[0])} and at step {step(steps[-1])}"
    else:
        verb = "rose" if last > first else "fell"
        change = (
            f"{verb} from {number(first)} at step {step(steps[0])} to {number(last)} at step {step(steps[-1])}, "
            f"by {number(abs(last - first))}"
        )
    between = []
    for word, value in (("lowest", min(values)), ("highest", max(values))):
        if number(value) not in (number(first), number(last)):
            between.append(f"{word} {number(value)} at step {step(steps[values.index(value)])}")
    return f"{name} {change}{''.join(f'; {text}' for text in between)}.{broken}"


def moved_loss(name: str, curve: Curve) -> str:
    """The same of a training loss, of which a reading of exactly 0 is more likely none than the best."""
    rest = without_zeros(curve)
    zeros = len(curve.steps) - len(rest.steps)
    if not zeros:
        return moved(name, curve)
    first = curve.steps[curve.values.index(0)]
    told = moved(name, rest) or f"{capital(name)}: no reading is another number."
    are = "is" if zeros == 1 else "are"
    return (
        f"{told} {zeros:,} of its {len(curve.steps):,} readings {are} exactly 0, the first at step {step(first)}, and "
        f"left out here: {ZERO}."
    )


def without_zeros(curve: Curve) -> Curve:
    """Leave out readings of exactly 0."""
    kept = [(s, v) for s, v in zip(*curve, strict=True) if v != 0]
    return Curve([s for s, _ in kept], [v for _, v in kept])


def summary(run: Run) -> dict[str, list[str]]:
    """Sentences on the quantities of the run by their topic, in the order of the pictures."""
    topics = {
        "Stop": _plateau(run),
        "Collapse": [f"The alarm was raised: {text}." for text in collapses(run)],
        **_by_topic(run),
        **{named(name): list(itertools.chain(*_by_topic(run.named(name)).values())) for name in run.names},
    }
    said = {topic: [sentence for sentence in sentences if sentence] for topic, sentences in topics.items()}
    return {topic: sentences for topic, sentences in said.items() if sentences}


def _by_topic(run: Run) -> dict[str, list[str]]:
    return {
        "Loss": [
            moved_loss("training loss", run.curve(Quantity("loss"))),
            *(moved(f"{_on(name)}loss", run.curve(Quantity("loss", "", name))) for name in run.held_out_sets("loss")),
        ],
        **{capital(metric_name(metric)): _layers(run, metric) for metric in LAYER_METRICS},
        "Spectrum": _spectrum(run),
        "Image and text": _pairs(run),
        "Stages": _stages(run),
        "Left out": [_sinks(run), *_nonfinite(run)],
    }


def missing(run: Run) -> list[str]:
    """List what was never logged, and what was logged for a part of the run only."""
    logged = {(q.metric, q.held_out is not None) for q in run.all_keys}
    layered = {q.metric for q in run.all_keys if q.place and q.place not in (*STAGES, *TOWERS)}
    absent = [
        name
        for name, there in (
            ("training loss", ("loss", False) in logged),
            ("held-out loss", ("loss", True) in logged),
            ("matrix entropy of layers", bool(layered & {"matrix_entropy", "sequence_matrix_entropy"})),
            ("effective rank of layers", bool(layered & {"effective_rank", "sequence_effective_rank"})),
            ("Diff-eRank", "diff_erank" in layered),
            ("spectrum", any(q.metric.startswith(SPECTRUM_TOP) for q in run.all_keys)),
            ("image-text alignment", any(q.metric == "alignment" for q in run.all_keys)),
        )
        if not there
    ]
    found = [f"Not in the log of this run: {', '.join(absent)}."] if absent else []
    partial: dict[tuple[str, float, float], list[str]] = {}
    for quantity, key in run.all_keys.items():
        steps = run.columns[key].steps
        # Fewer readings do not show at which interval they were meant to be logged.
        if len(steps) < 3 or quantity.metric in ("nonfinite_tokens", "plateau"):
            continue
        usual = median(b - a for a, b in itertools.pairwise(steps))
        late, early = steps[0] - run.steps[0] > 2 * usual, run.steps[-1] - steps[-1] > 2 * usual
        if late or early:
            partial.setdefault((quantity.metric, steps[0], steps[-1]), []).append(key)
    for (metric, first, last), keys in partial.items():
        what = keys[0] if len(keys) == 1 else f"{metric_name(metric)} ({len(keys)} names, such as {keys[0]})"
        found.append(
            f"{what} was logged from step {step(first)} to step {step(last)} only; the log as a whole goes from step "
            f"{step(run.steps[0])} to step {step(run.steps[-1])}."
        )
    return found


def collapses(run: Run) -> list[str]:
    """Say which alarms of a collapse were raised where: four entries at most, as a model may collapse in all layers."""
    alarms = []
    for key, steps in sorted(run.alarms.items(), key=lambda item: item[1][0]):
        more = f", {len(steps)} times until step {step(steps[-1])}" if len(steps) > 1 else ""
        alarms.append(f"{key} at step {step(steps[0])}{more}")
    return alarms if len(alarms) <= 4 else [*alarms[:3], f"{len(alarms) - 3} more, the last {alarms[-1]}"]


def _pairs(run: Run) -> list[str]:
    measured = pairs(run)
    return [
        moved(f"{name}, {group.name},", group.curve(run, "alignment", place))
        for place, name in PAIRS.items()
        for group in measured
    ]


def _stages(run: Run) -> list[str]:
    found = []
    for metric in ("effective_rank", "matrix_entropy"):
        data, curves = stages(run, metric, (*STAGES, *TOWERS))
        for place, curve in curves.items():
            found.append(moved(f"{metric_name(metric)} of {place_name(place)}, {data},", curve))
    return found


def _layers(run: Run, metric: str) -> list[str]:
    """Describe the last layer on all data sets, and count how many layers rose and fell."""
    found = []
    data = {source: layers for source in run.sources(metric) if (layers := layers_only(run.places(metric, source)))}
    for held_out, layers in data.items():
        curve = run.curve(Quantity(metric, layers[-1], held_out))
        found.append(moved(f"{_on(held_out)}{metric_name(metric)} of {_the(layers[-1])}", curve))
        found.append(_without_readings(run, metric, held_out, layers[:-1]))
    source, layers = next(iter(data.items()), (None, []))
    curves = {layer: curve.finite() for layer, curve in run.curves(metric, layers, source).items()}
    curves = {layer: curve for layer, curve in curves.items() if len(curve.values) > 1}
    found = [sentence for sentence in found if sentence]
    # What the digits do not show is no change.
    moving = {layer: c for layer, c in curves.items() if number(c.values[0]) != number(c.values[-1])}
    if len(curves) > 1 and not moving:
        found.insert(1, f"From first to last reading it is the same in all {len(curves)} layers.")
    elif len(curves) > 1:
        rose, fell = (sum(sign * curve.change() > 0 for curve in moving.values()) for sign in (1, -1))
        all_of = [word for word, number_of in (("rose", rose), ("fell", fell)) if number_of == len(curves)]
        which = f"{all_of[0]} in all {len(curves)}" if all_of else f"rose in {rose} and fell in {fell} of {len(curves)}"
        most = max(moving, key=lambda layer: abs(moving[layer].change()))
        first, last = moving[most].values[0], curves[most].values[-1]
        found.insert(
            1,  # after the sentence on the same data
            f"From first to last reading it {which} layers, most in {_the(most)}: from {number(first)} to "
            f"{number(last)}{'' if source is None else ' (' + held_out_name(source) + ')'}.",
        )
    return found


def without_reading(run: Run, metric: str, held_out: str | None) -> list[str]:
    """The layers of which every reading is NaN or infinite: no token of theirs counted."""
    finite = run.layers(metric, held_out)
    return [layer for layer in layers_only(run.places(metric, held_out)) if layer not in finite]


def _without_readings(run: Run, metric: str, held_out: str | None, layers: list[str]) -> str:
    """Say of which layers, of those that have no sentence of their own, readings are missing."""
    empty, partial = [], []
    for layer, curve in run.curves(metric, layers, held_out).items():
        bad = len(curve.values) - len(curve.finite().values)
        if bad == len(curve.values):
            empty.append(layer)
        elif bad:
            partial.append(f"{layer} ({bad:,} of {len(curve.values):,})")
    clauses = [
        f"no reading of {listed(empty)} is a finite number" if empty else "",
        f"readings that are NaN or infinite: {listed(partial)}" if partial else "",
    ]
    return (
        f"{capital(_on(held_out) + metric_name(metric))}: {'; '.join(filter(None, clauses))}." if any(clauses) else ""
    )


def _on(held_out: str | None) -> str:
    """Prefix for quantities that were measured on held-out data."""
    return "" if held_out is None else "held-out " if not held_out else f"held-out ({held_out}) "


def _the(layer: str) -> str:
    return f"the {place_name(layer)}" if layer == "last" else place_name(layer)


def _spectrum(run: Run) -> list[str]:
    top = f"{SPECTRUM_TOP}1"
    for held_out in run.sources(top)[:1]:
        layer = next(iter(layers_only(run.places(top, held_out))[::-1]), "last")
        curve = run.curve(Quantity(top, layer, held_out))
        name = f"{_on(held_out)}share of the variance in the strongest direction of {_the(layer)}"
        return [moved(name, curve)]
    return []


def _plateau(run: Run) -> list[str]:
    if run.stop is not None:
        return [f"PlateauStopping ended the run on {run.stop.monitor}: {run.stop.reason}."]
    found = []
    for place in run.places("plateau"):
        since = run.curve(Quantity("plateau", f"{place}/since_progress")).finite()
        if since.values:
            found.append(
                f"PlateauStopping watched {place}: at its last observation, at step {step(since.steps[-1])}, "
                f"{number(since.values[-1])} observations had passed since progress."
            )
    return found


def _sinks(run: Run) -> str:
    """Say which layers have attention sinks, and whether these are left out of the layers' other numbers."""
    source, layers = run.shown("sink_tokens")
    counts = {layer: run.curve(Quantity("sink_tokens", layer, source)).finite().values[-1] for layer in layers}
    found = [f"{place_name(layer)} ({number(count)} a sequence)" for layer, count in counts.items() if count]
    if not found:
        return ""
    data = "" if source is None else f" ({held_out_name(source)})"
    what = {"True": "leave them out", "False": "include them"}.get(
        run.settings.get(sinks_setting(run.part), run.settings.get("exclude_sinks", "")),
        "leave them out, unless `exclude_sinks=False` was given, which the log does not say",
    )
    return (
        f"At the last reading{data} there are attention sinks in {len(found)} of {len(layers)} layers: "
        f"{listed(found)}; entropies and ranks {what}."
    )


def _nonfinite(run: Run) -> list[str]:
    found = []
    for layer in run.places("nonfinite_tokens"):
        curve = run.curve(Quantity("nonfinite_tokens", layer)).finite()
        total = sum(curve.values)
        if total:
            at = next(s for s, v in zip(*curve, strict=True) if v)
            found.append(
                f"In {_the(layer)} {number(total)} tokens that held NaN or Inf were left out, from step {step(at)} on."
            )
    return found
