"""Chooses the pictures of a report, and collects the numbers that each of them shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from matent_callbacks.accumulate.catalogue import SPECTRUM_TOP
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.plot import layer_heatmap, spectrum_shares, step_curves
from matent_callbacks.report._findings import best_source, moved
from matent_callbacks.report._keys import LAYER_METRICS, Quantity
from matent_callbacks.report._run import Curve, Run
from matent_callbacks.report._svg import SIZE, style, to_svg
from matent_callbacks.report._thin import evenly, peaks
from matent_callbacks.report._words import (
    AXES,
    ENTROPIES,
    PAIRS,
    RANKS,
    TOWERS,
    capital,
    held_out_name,
    layers_only,
    metric_name,
    number,
    place_name,
    step,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES, _COLUMNS, _ROWS, _LABEL = 4, 240, 60, 30


class Picture(NamedTuple):
    """A picture with its words and its numbers."""

    name: str
    title: str
    caption: str
    svg: str
    columns: list[str]
    rows: list[list[str]]
    table_caption: str


def pictures(run: Run) -> dict[str, list[Picture]]:
    """The pictures by the section that they belong to."""
    used_entropy = next((m for m in ENTROPIES if _layers(run, m)[1]), None)
    used_rank = next((m for m in RANKS if _layers(run, m)[1]), None)
    with style():
        return {
            "Loss beside entropy and effective rank": [
                *_loss(run),
                *(p for m in (used_entropy, used_rank) if m for p in _metric(run, m)),
            ],
            "Layer by layer": [*_heatmap(run, used_rank or used_entropy), *_spectrum(run)],
            "Image and text": [*_alignment(run), *_stages(run)],
            "Further quantities": [
                p for m in LAYER_METRICS if m not in (used_entropy, used_rank) for p in _metric(run, m)
            ],
        }


def _loss(run: Run) -> Iterator[Picture]:
    curves = {"training": run.curve(Quantity("loss"))}
    points = {held_out_name(name): run.curve(Quantity("loss", "", name)) for name in run.held_out_sets("loss")}
    yield from _curves(run, "loss", "Loss", AXES["loss"], curves, points)


def _metric(run: Run, metric: str) -> Iterator[Picture]:
    source, layers = _layers(run, metric)
    if not layers:
        return
    shown = evenly(layers, _CURVES)
    data = "" if source is None else f", {held_out_name(source)}"
    curves = {place_name(layer) + data: run.curve(Quantity(metric, layer, source)) for layer in shown}
    points = {}
    if source is None:
        for name in run.held_out_sets(metric, layers[-1]):
            points[f"{place_name(layers[-1])}, {held_out_name(name)}"] = run.curve(Quantity(metric, layers[-1], name))
    about = f"{len(shown)} of {len(layers)} layers." if len(shown) < len(layers) else ""
    title = metric_name(metric)
    yield from _curves(run, metric, capital(title), AXES.get(metric, metric), curves, points, about)


def _alignment(run: Run) -> Iterator[Picture]:
    for place, title in PAIRS.items():
        curves = {"training": run.curve(Quantity("alignment", place))}
        points = {
            held_out_name(name): run.curve(Quantity("alignment", place, name))
            for name in run.held_out_sets("alignment", place)
        }
        unit = {"image_text": "mean / max (1: aligned)", "mutual_information": "nats"}.get(place, title)
        yield from _curves(run, f"alignment-{place}", capital(title), unit, curves, points)


def _stages(run: Run) -> Iterator[Picture]:
    for metric in ("effective_rank", "matrix_entropy"):
        for name, places in (("stages", STAGES), ("towers", TOWERS)):
            curves = {place_name(p): run.curve(Quantity(metric, p, best_source(run, metric, p))) for p in places}
            title = ("Where the image goes: " if name == "stages" else "Both towers: ") + metric_name(metric)
            about = "On the held-out data." if any(best_source(run, metric, p) is not None for p in places) else ""
            yield from _curves(run, f"{name}-{metric}", title, AXES[metric], curves, {}, about)


def _curves(
    run: Run,
    name: str,
    title: str,
    unit: str,
    lines: dict[str, Curve],
    points: dict[str, Curve],
    about: str = "",
) -> Iterator[Picture]:
    """One picture of quantities over steps, or none where none of them has a finite reading."""
    lines, points = ({k: c for k, c in group.items() if c.finite().values} for group in (lines, points))
    # Evaluations alone are a curve as good as any.
    lines, points = (lines, points) if lines else (points, {})
    everything = {**lines, **points}
    if not everything:
        return
    figure, ax = _figure()
    drawn = {_short(label): peaks(curve) for label, curve in everything.items()}
    stop = run.stop.step if run.stop else None
    step_curves(drawn, ax=ax, unit=unit, points=[_short(label) for label in points], stop=stop)
    _finish(figure, ax)
    most = max(everything.values(), key=lambda curve: len(curve.steps))
    if len(peaks(most).steps) < len(most.steps):
        of = f"{len(peaks(most).steps):,} of {len(most.steps):,}"
        about += f" Drawn are {of} readings: of each stretch the first, the lowest, the highest and the last."
    caption = about.strip()
    description = " ".join(moved(label, curve) for label, curve in everything.items())
    svg = to_svg(figure, name=name, title=title, description=description)
    steps = sorted({s for curve in everything.values() for s in curve.steps})
    columns = {label: dict(zip(*curve, strict=True)) for label, curve in everything.items()}
    rows = [
        [step(s), *(number(column[s]) if s in column else "" for column in columns.values())]
        for s in evenly(steps, _ROWS)
    ]
    yield Picture(name, title, caption, svg, ["step", *everything], rows, _shown(len(rows), len(steps)))


def _heatmap(run: Run, metric: str | None) -> Iterator[Picture]:
    if metric is None:
        return
    source, layers = _layers(run, metric)
    curves = {layer: run.curve(Quantity(metric, layer, source)).finite() for layer in layers}
    # The scale is logarithmic.
    cells = {layer: {s: v for s, v in zip(*c, strict=True) if v > 0} for layer, c in curves.items()}
    steps = sorted({s for column in cells.values() for s in column})
    if len(layers) < 2 or not steps:
        return
    shown = evenly(steps, _COLUMNS)
    records = [{"step": s, **{f"{metric}/{n}": c[s] for n, c in cells.items() if s in c}} for s in shown]
    figure, ax = _figure(SIZE[1] + 0.1 * max(0, min(len(layers), 40) - 12))
    ax.grid(False)
    layer_heatmap(records, metric, ax=ax)
    ticks = list(zip(ax.get_yticks(), (label.get_text() for label in ax.get_yticklabels()), strict=True))
    every = math.ceil(len(ticks) / 14)
    ticks = [*ticks[: -every or None : every], ticks[-1]] if every > 1 else ticks
    ax.set_yticks([place for place, _ in ticks], [_short(label, 20) for _, label in ticks])
    if run.stop:
        # On cells of every colour: light below, dark above, in both themes.
        ax.axvline(run.stop.step, color="white", linewidth=2.4)
        ax.axvline(run.stop.step, color="#010101", linestyle="--", linewidth=1)
    _finish(figure, ax, legend=False)
    title = f"{capital(metric_name(metric))} of every layer"
    caption = "Embeddings at the bottom, the last layer on top." if "last" in layers else ""
    if source is not None:
        caption += f" Data: {held_out_name(source)}."
    if len(shown) < len(steps):
        caption += f" Drawn are {len(shown)} of {len(steps):,} readings, evenly spaced."
    description = " ".join(moved(place_name(layer), curves[layer]) for layer in evenly(layers, 8))
    svg = to_svg(figure, name="heatmap", title=title, description=description)
    listed = evenly(steps, 20)
    rows = [[place_name(n), *(number(cells[n][s]) if s in cells[n] else "" for s in listed)] for n in reversed(layers)]
    columns = ["layer", *(f"step {step(s)}" for s in listed)]
    yield Picture("heatmap", title, caption.strip(), svg, columns, rows, _shown(len(listed), len(steps)))


def _spectrum(run: Run) -> Iterator[Picture]:
    logged = {q.metric for q in run.keys if q.metric.startswith(SPECTRUM_TOP)}
    sizes = sorted(int(metric.removeprefix(SPECTRUM_TOP)) for metric in logged)
    if not sizes:
        return
    source, layers = _layers(run, f"{SPECTRUM_TOP}{sizes[0]}")
    readings: dict[str, dict[float, dict[int, float]]] = {layer: {} for layer in layers}
    for layer in layers:
        for k in sizes:
            for s, share in zip(*run.curve(Quantity(f"{SPECTRUM_TOP}{k}", layer, source)).finite(), strict=True):
                readings[layer].setdefault(s, {})[k] = share
    layer = layers[-1]
    steps = sorted(readings[layer])
    if not steps:
        return
    chosen = evenly(steps, 3)
    figure, ax = _figure()
    spectrum_shares({f"step {step(s)}": readings[layer][s] for s in chosen}, ax=ax)
    _finish(figure, ax)
    title = f"Spectrum of {place_name(layer) if layer != 'last' else 'the last layer'}"
    caption = "Which share of the variance the k strongest directions hold together."
    if source is not None:
        caption += f" Data: {held_out_name(source)}."
    description = " ".join(
        f"At step {step(s)}: " + ", ".join(f"{v:.1%} in {k}" for k, v in sorted(readings[layer][s].items())) + "."
        for s in chosen
    )
    svg = to_svg(figure, name="spectrum", title=title, description=description)
    rows = [
        [place_name(n), step(s), *(f"{readings[n][s][k]:.1%}" if k in readings[n][s] else "" for k in sizes)]
        for n in layers
        for s in evenly(sorted(readings[n]), 3)
    ]
    yield Picture("spectrum", title, caption, svg, ["layer", "step", *(f"k = {k}" for k in sizes)], rows, "")


def _layers(run: Run, metric: str) -> tuple[str | None, list[str]]:
    """Choose the data set that a metric is shown for (training before held-out data) and list its layers there."""
    for source in run.sources(metric):
        layers = [
            n for n in layers_only(run.places(metric, source)) if run.curve(Quantity(metric, n, source)).finite().values
        ]
        if layers:
            return source, layers
    return None, []


def _figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Figure, ax: Axes, *, legend: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if ax.get_xlabel() == "step":
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if math.fabs(ax.get_xlim()[1]) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.4g} k" if value else "0"))
    _, labels = ax.get_legend_handles_labels()
    if legend and labels:
        # Two columns where the two longest labels have room beside each other.
        fits = sum(sorted(map(len, labels))[-2:]) <= 40
        figure.legend(loc="outside lower center", ncols=2 if fits and len(labels) > 1 else 1)


def _short(label: str, limit: int = _LABEL) -> str:
    """Shorten long module names in the middle, where they say least."""
    return label if len(label) <= limit else f"{label[: limit // 2 - 1]}…{label[-limit // 2 :]}"


def _shown(rows: int, total: int) -> str:
    return f"{rows} of {total:,} steps, evenly spaced." if rows < total else ""
