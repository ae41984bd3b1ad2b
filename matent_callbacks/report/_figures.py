"""Chooses the pictures of a report, and collects the numbers that each of them shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from matent_callbacks.accumulate.catalogue import SPECTRUM_TOP
from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.plot import layer_heatmap, layer_profile, spectrum_shares, step_curves
from matent_callbacks.plot._style import LOGARITHMIC, evenly, mark, short
from matent_callbacks.report._findings import ZERO, collapses, moved, moved_loss, without_reading
from matent_callbacks.report._keys import DRIFT, LAYER_METRICS, Quantity
from matent_callbacks.report._pairs import pairs, stages
from matent_callbacks.report._picture import Picture, Table, empty_figure, how_many, peaks, picture, style
from matent_callbacks.report._picture import table_over_steps as table
from matent_callbacks.report._run import Curve, Run
from matent_callbacks.report._words import (
    AXES,
    ENTROPIES,
    PAIRS,
    RANKS,
    about_data,
    capital,
    held_out_name,
    listed,
    metric_name,
    named,
    number,
    pair_unit,
    place_name,
    step,
)

_Lines: TypeAlias = dict[str, Curve]
_Cells: TypeAlias = dict[str, dict[float, float]]  # values by layer and step
_CURVES, _COLUMNS = 4, 240
# Widths of the heat map on narrow and wide pages, and the height of a layer in it, in inches.
_NARROW, _WIDE, _ROW = 4.2, 10.5, 0.18


def pictures(run: Run) -> dict[str, list[Picture]]:
    """Draw the pictures by section; each name of a callback or a probe has a section of its own."""
    with style():
        found = _sections(run)
        for name in run.names:
            found[named(name)] = [picture for section in _sections(run.named(name)).values() for picture in section]
    return found


def _sections(run: Run) -> dict[str, list[Picture]]:
    used_entropy = next((m for m in ENTROPIES if run.shown(m)[1]), None)
    used_rank = next((m for m in RANKS if run.shown(m)[1]), None)
    return {
        "Loss beside entropy and effective rank": [
            *_loss(run),
            *(p for m in (used_entropy, used_rank) if m for p in _metric(run, m)),
        ],
        "Layer by layer": [*_heatmaps(run, used_rank or used_entropy), *_drift(run), *_spectrum(run)],
        "Image and text": [*_alignment(run), *_stages(run)],
        "Further quantities": [p for m in LAYER_METRICS if m not in (used_entropy, used_rank) for p in _metric(run, m)],
    }


def _loss(run: Run) -> Iterator[Picture]:
    training = run.curve(Quantity("loss"))
    about = f"Where it is exactly 0, it may be none: {ZERO}." if 0 in training.values else ""
    yield from _curves(run, "loss", "Loss", AXES["loss"], {"training": training}, _held_out(run), about)


def _held_out(run: Run, metric: str = "loss", place: str = "", prefix: str = "") -> dict[str, Curve]:
    sets = run.held_out_sets(metric, place)
    return {prefix + held_out_name(name): run.curve(Quantity(metric, place, name)) for name in sets}


def _metric(run: Run, metric: str) -> Iterator[Picture]:
    source, layers = run.shown(metric)
    if not layers:
        return
    curves, about = run.curves(metric, layers, source), ""
    if len(layers) > _CURVES:
        most = sorted(layers[1:-1], key=lambda layer: -abs(curves[layer].change(metric)))[: _CURVES - 2]
        curves = {layer: curve for layer, curve in curves.items() if layer in (layers[0], *most, layers[-1])}
        about = f"Of {len(layers)} layers the first, the last, and the two that moved most from first to last reading."
    data = "" if source is None else f", {held_out_name(source)}"
    lines = {place_name(layer) + data: curve for layer, curve in curves.items()}
    points = _held_out(run, metric, layers[-1], f"{place_name(layers[-1])}, ") if source is None else {}
    if source is None and run.measured:
        others = "; what is held out, on the batches of evaluations" if points else ""
        about = f"{about} Measured on {run.measured}{others}.".strip()
    title = capital(metric_name(metric))
    yield from _curves(run, metric, title, AXES.get(metric, metric), lines, points, about, ranks=metric in LOGARITHMIC)


def _alignment(run: Run) -> Iterator[Picture]:
    measured = pairs(run)
    about = "At evaluations other pairs were measured, or the same ones at other steps." if len(measured) > 1 else ""
    for place, title in PAIRS.items():
        curves = {group.name: group.curve(run, "alignment", place) for group in measured}
        points = {name: curves.pop(name) for name in [*curves][1:]}
        yield from _curves(run, f"alignment-{place}", capital(title), pair_unit(place), curves, points, about)


def _stages(run: Run) -> Iterator[Picture]:
    for metric in ("effective_rank", "matrix_entropy"):
        for name, places in (("stages", STAGES), ("towers", TOWERS)):
            group, curves = stages(run, metric, places)
            curves = {place_name(place): curve for place, curve in curves.items()}
            title = ("Where the image goes: " if name == "stages" else "Both towers: ") + metric_name(metric)
            about = f"Data: {group}."
            ranks = metric in LOGARITHMIC
            yield from _curves(run, f"{name}-{metric}", title, AXES[metric], curves, {}, about, ranks=ranks)


def _curves(
    run: Run, name: str, title: str, unit: str, lines: _Lines, points: _Lines, about: str = "", *, ranks: bool = False
) -> Iterator[Picture]:
    """One picture of quantities over steps, or none where none of them has a finite reading."""
    lines, points = ({k: c for k, c in group.items() if c.finite().values} for group in (lines, points))
    # Evaluations alone are drawn as lines, not as points.
    lines, points = (lines, points) if lines else (points, {})
    everything = {**lines, **points}
    if not everything:
        return
    figure, ax = empty_figure()
    drawn = {short(label): peaks(curve) for label, curve in everything.items()}
    stop = run.stop.step if run.stop else None
    step_curves(drawn, ax=ax, unit=unit, points=map(short, points), stop=stop, alarms=run.alarm_steps, ranks=ranks)
    count, kept = max((len(curve.steps), len(peaks(curve).steps)) for curve in everything.values())
    thinned = f"{kept:,} of {count:,} readings: of each stretch the first, the lowest, the highest and the last."
    caption = [about, f"Drawn are {thinned}" if kept < count else ""]
    describe = moved_loss if name == "loss" else moved
    changes = [describe(label, curve) for label, curve in everything.items()]
    yield picture([figure], f"{run.ids}{name}", title, changes, table(everything), caption)


def _heatmaps(run: Run, metric: str | None) -> Iterator[Picture]:
    """The values of all layers, and how far each is from its first."""
    source, cells, steps = _cells(run, metric or "")
    if metric is None or len(cells) < 2 or not steps:
        return
    records, drawn = _records(metric, cells, steps, _COLUMNS)
    empty = without_reading(run, metric, source)
    caption = [
        "Embeddings at the bottom, the last layer on top." if "last" in cells else "",
        about_data(source, run.measured),
        f"Without a finite reading: {listed(empty)}." if empty else "",
        drawn,
        f"Dashed: the plateau, at step {step(run.stop.step)}." if run.stop else "",
        f"Dotted: {', '.join(collapses(run))}." if run.alarms else "",
    ]
    title, ratios = capital(metric_name(metric)), metric in LOGARITHMIC
    firsts = {layer: next(iter(column.values()), 0.0) for layer, column in cells.items()}
    changes = {
        layer: {s: v / firsts[layer] if ratios else v - firsts[layer] for s, v in column.items()}
        for layer, column in cells.items()
    }
    compared = f"Each value {'over' if ratios else 'minus'} its layer's first: grey no change, blue less, orange more."
    for name, heading, sentence, values in (
        ("heatmap", f"{title} of every layer", "", cells),
        ("change", f"{title}: change since the first measurement", compared, changes),
    )[: 1 + any(len({*column.values()}) > 1 for column in cells.values())]:
        figures = []
        for width in (_NARROW, _WIDE):
            figure, ax = empty_figure(width, max(2.4, 0.9 + _ROW * min(len(cells), 40)))
            layer_heatmap(records, metric, ax=ax, change=values is changes)
            ax.set_title("")
            mark(ax, stop=run.stop.step if run.stop else None, alarm_steps=run.alarm_steps, on_cells=True)
            figures.append(figure)
        summary, numbers = _changes(values), _by_layer(values, steps)
        yield picture(figures, f"{run.ids}{name}", heading, summary, numbers, [sentence, *caption], legend=False)


def _drift(run: Run) -> Iterator[Picture]:
    """How far each layer is from the reference, by depth."""
    source, cells, steps = _cells(run, DRIFT)
    if len(cells) < 2:
        return
    records, drawn = _records(DRIFT, cells, steps, _CURVES)
    figure, ax = empty_figure()
    layer_profile(records, DRIFT, ax=ax)
    ax.set_title("")
    ax.legend().remove()
    caption = [
        "How far each layer has moved from the reference; 0: not at all.",
        about_data(source, run.measured),
        drawn,
    ]
    numbers = _by_layer(cells, steps)
    yield picture([figure], f"{run.ids}drift-by-depth", "Drift by depth", _changes(cells), numbers, caption)


def _cells(run: Run, metric: str) -> tuple[str | None, _Cells, list[float]]:
    """The data that a metric is shown for, its finite values by layer and step, and all steps that have one."""
    source, layers = run.shown(metric)
    # Of ranks those above 0, as their scale is logarithmic.
    cells = {
        layer: {s: v for s, v in zip(*curve.finite(), strict=True) if v > 0 or metric not in RANKS}
        for layer, curve in run.curves(metric, layers, source).items()
    }
    return source, cells, sorted({s for column in cells.values() for s in column})


def _records(metric: str, cells: _Cells, steps: list[float], most: int) -> tuple[list[dict[str, float]], str]:
    """Records of evenly spaced readings, as they are drawn, and a sentence on how many these are if not all."""
    shown = evenly(steps, most)
    records = [{"step": s, **{f"{metric}/{n}": c[s] for n, c in cells.items() if s in c}} for s in shown]
    return records, f"Drawn are {len(shown)} of {len(steps):,} readings, evenly spaced." * (len(shown) < len(steps))


def _changes(cells: _Cells) -> list[str]:
    return [moved(place_name(n), Curve(list(cells[n]), list(cells[n].values()))) for n in evenly(list(cells), 8)]


def _by_layer(cells: _Cells, steps: list[float]) -> Table:
    """Columns, rows and caption of a table of layers by steps, the last layer on top."""
    shown = evenly(steps, 20)
    rows = [[place_name(n), *(number(cells[n][s]) if s in cells[n] else "" for s in shown)] for n in reversed(cells)]
    return ["layer", *(f"step {step(s)}" for s in shown)], rows, how_many(len(shown), len(steps))


def _spectrum(run: Run) -> Iterator[Picture]:
    logged = {q.metric for q in run.keys if q.metric.startswith(SPECTRUM_TOP)}
    sizes = sorted(int(metric.removeprefix(SPECTRUM_TOP)) for metric in logged)
    source, layers = run.shown(f"{SPECTRUM_TOP}{sizes[0]}") if sizes else (None, [])
    if not layers:
        return
    readings: dict[str, dict[float, dict[int, float]]] = {layer: {} for layer in layers}
    for k in sizes:
        for layer, curve in run.curves(f"{SPECTRUM_TOP}{k}", layers, source).items():
            for s, share in zip(*curve.finite(), strict=True):
                readings[layer].setdefault(s, {})[k] = share
    last = readings[layers[-1]]
    chosen = evenly(sorted(last), 3)
    figure, ax = empty_figure()
    spectrum_shares({f"step {step(s)}": last[s] for s in chosen}, ax=ax)
    title = f"Spectrum of {place_name(layers[-1]) if layers[-1] != 'last' else 'the last layer'}"
    caption = [
        "Which share of the variance the k strongest directions hold together.",
        about_data(source, run.measured),
    ]
    shares = [
        f"At step {step(s)}: " + ", ".join(f"{v:.1%} in {k}" for k, v in sorted(last[s].items())) + "." for s in chosen
    ]
    rows = [
        [place_name(n), step(s), *(f"{readings[n][s][k]:.1%}" if k in readings[n][s] else "" for k in sizes)]
        for n in layers
        for s in evenly(sorted(readings[n]), 3)
    ]
    numbers = ["layer", "step", *(f"k = {k}" for k in sizes)], rows, ""
    yield picture([figure], f"{run.ids}spectrum", title, shares, numbers, caption)
