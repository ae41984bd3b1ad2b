"""Chooses the pictures of a report, and collects the numbers that each of them shows."""

from __future__ import annotations

from collections.abc import Iterator

from matent_callbacks.accumulate.catalogue import SPECTRUM_TOP
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.plot import layer_heatmap, spectrum_shares, step_curves
from matent_callbacks.plot._style import LOGARITHMIC, mark, short
from matent_callbacks.report._findings import best_source, collapses, moved, without_reading
from matent_callbacks.report._keys import LAYER_METRICS, Quantity
from matent_callbacks.report._picture import (
    Picture,
    empty_figure,
    evenly,
    how_many,
    peaks,
    style,
    table_over_steps,
    to_svg,
)
from matent_callbacks.report._run import Curve, Run
from matent_callbacks.report._words import (
    AXES,
    ENTROPIES,
    PAIRS,
    RANKS,
    TOWERS,
    about_data,
    capital,
    held_out_name,
    layers_only,
    listed,
    metric_name,
    named,
    number,
    pair_unit,
    place_name,
    step,
)

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
    used_entropy = next((m for m in ENTROPIES if _layers(run, m)[1]), None)
    used_rank = next((m for m in RANKS if _layers(run, m)[1]), None)
    return {
        "Loss beside entropy and effective rank": [
            *_loss(run),
            *(p for m in (used_entropy, used_rank) if m for p in _metric(run, m)),
        ],
        "Layer by layer": [*_heatmap(run, used_rank or used_entropy), *_spectrum(run)],
        "Image and text": [*_alignment(run), *_stages(run)],
        "Further quantities": [p for m in LAYER_METRICS if m not in (used_entropy, used_rank) for p in _metric(run, m)],
    }


def _loss(run: Run) -> Iterator[Picture]:
    curves = {"training": run.curve(Quantity("loss"))}
    points = {held_out_name(name): run.curve(Quantity("loss", "", name)) for name in run.held_out_sets("loss")}
    yield from _curves(run, "loss", "Loss", AXES["loss"], curves, points)


def _metric(run: Run, metric: str) -> Iterator[Picture]:
    source, layers = _layers(run, metric)
    if not layers:
        return
    shown = _shown(run, metric, source, layers)
    data = "" if source is None else f", {held_out_name(source)}"
    curves = {place_name(layer) + data: run.curve(Quantity(metric, layer, source)) for layer in shown}
    points = {}
    if source is None:
        for name in run.held_out_sets(metric, layers[-1]):
            points[f"{place_name(layers[-1])}, {held_out_name(name)}"] = run.curve(Quantity(metric, layers[-1], name))
    about = ""
    if len(shown) < len(layers):
        about = f"Of {len(layers)} layers the first, the last, and the two that moved most from first to last reading."
    title = metric_name(metric)
    ranks = metric in LOGARITHMIC
    yield from _curves(run, metric, capital(title), AXES.get(metric, metric), curves, points, about, ranks=ranks)


def _shown(run: Run, metric: str, source: str | None, layers: list[str]) -> list[str]:
    """Choose the layers whose curves are drawn: all of few, of many the first, the last and those that moved most."""
    if len(layers) <= _CURVES:
        return layers
    between = sorted(layers[1:-1], key=lambda layer: -abs(run.curve(Quantity(metric, layer, source)).change()))
    return [layer for layer in layers if layer in (layers[0], layers[-1], *between[: _CURVES - 2])]


def _alignment(run: Run) -> Iterator[Picture]:
    for place, title in PAIRS.items():
        curves = {"training": run.curve(Quantity("alignment", place))}
        points = {
            held_out_name(name): run.curve(Quantity("alignment", place, name))
            for name in run.held_out_sets("alignment", place)
        }
        yield from _curves(run, f"alignment-{place}", capital(title), pair_unit(place), curves, points)


def _stages(run: Run) -> Iterator[Picture]:
    for metric in ("effective_rank", "matrix_entropy"):
        for name, places in (("stages", STAGES), ("towers", TOWERS)):
            curves = {place_name(p): run.curve(Quantity(metric, p, best_source(run, metric, p))) for p in places}
            title = ("Where the image goes: " if name == "stages" else "Both towers: ") + metric_name(metric)
            about = "On the held-out data." if any(best_source(run, metric, p) is not None for p in places) else ""
            ranks = metric in LOGARITHMIC
            yield from _curves(run, f"{name}-{metric}", title, AXES[metric], curves, {}, about, ranks=ranks)


def _curves(
    run: Run,
    name: str,
    title: str,
    unit: str,
    lines: dict[str, Curve],
    points: dict[str, Curve],
    about: str = "",
    *,
    ranks: bool = False,
) -> Iterator[Picture]:
    """One picture of quantities over steps, or none where none of them has a finite reading."""
    lines, points = ({k: c for k, c in group.items() if c.finite().values} for group in (lines, points))
    # Evaluations alone are drawn as lines, not as points.
    lines, points = (lines, points) if lines else (points, {})
    everything = {**lines, **points}
    if not everything:
        return
    name = f"{run.ids}{name}"
    figure, ax = empty_figure()
    drawn = {short(label): peaks(curve) for label, curve in everything.items()}
    stop = run.stop.step if run.stop else None
    step_curves(
        drawn,
        ax=ax,
        unit=unit,
        points=[short(label) for label in points],
        stop=stop,
        alarms=run.alarm_steps,
        ranks=ranks,
    )
    most = max(everything.values(), key=lambda curve: len(curve.steps))
    if len(peaks(most).steps) < len(most.steps):
        of = f"{len(peaks(most).steps):,} of {len(most.steps):,}"
        about += f" Drawn are {of} readings: of each stretch the first, the lowest, the highest and the last."
    caption = about.strip()
    description = " ".join(moved(label, curve) for label, curve in everything.items())
    svg = to_svg(figure, name=name, title=title, description=description)
    yield Picture(name, title, caption, svg, *table_over_steps(everything))


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
    title = f"{capital(metric_name(metric))} of every layer"
    caption = "Embeddings at the bottom, the last layer on top." if "last" in layers else ""
    caption += f" {about_data(source)}".rstrip()
    empty = without_reading(run, metric, source, layers_only(run.places(metric, source)))
    if empty:
        caption += f" Without a finite reading: {listed(empty)}."
    if len(shown) < len(steps):
        caption += f" Drawn are {len(shown)} of {len(steps):,} readings, evenly spaced."
    if run.stop:
        caption += f" Dashed: the plateau, at step {step(run.stop.step)}."
    if run.alarms:
        caption += f" Dotted: {', '.join(collapses(run))}."
    description = " ".join(moved(place_name(layer), curves[layer]) for layer in evenly(layers, 8))
    name = f"{run.ids}heatmap"
    svgs = []
    for width, suffix in ((_NARROW, ""), (_WIDE, "-wide")):
        figure, ax = empty_figure(width, max(2.4, 0.9 + _ROW * min(len(layers), 40)))
        layer_heatmap(records, metric, ax=ax)
        ax.set_title("")
        mark(ax, stop=run.stop.step if run.stop else None, alarm_steps=run.alarm_steps, on_cells=True)
        svgs.append(to_svg(figure, name=name + suffix, title=title, description=description, legend=False))
    chosen = evenly(steps, 20)
    rows = [[place_name(n), *(number(cells[n][s]) if s in cells[n] else "" for s in chosen)] for n in reversed(layers)]
    columns = ["layer", *(f"step {step(s)}" for s in chosen)]
    yield Picture(name, title, caption.strip(), "".join(svgs), columns, rows, how_many(len(chosen), len(steps)), True)


def _spectrum(run: Run) -> Iterator[Picture]:
    logged = {q.metric for q in run.keys if q.metric.startswith(SPECTRUM_TOP)}
    sizes = sorted(int(metric.removeprefix(SPECTRUM_TOP)) for metric in logged)
    if not sizes:
        return
    source, layers = _layers(run, f"{SPECTRUM_TOP}{sizes[0]}")
    if not layers:
        return
    readings: dict[str, dict[float, dict[int, float]]] = {layer: {} for layer in layers}
    for layer in layers:
        for k in sizes:
            for s, share in zip(*run.curve(Quantity(f"{SPECTRUM_TOP}{k}", layer, source)).finite(), strict=True):
                readings[layer].setdefault(s, {})[k] = share
    layer = layers[-1]
    steps = sorted(readings[layer])
    chosen = evenly(steps, 3)
    figure, ax = empty_figure()
    spectrum_shares({f"step {step(s)}": readings[layer][s] for s in chosen}, ax=ax)
    title = f"Spectrum of {place_name(layer) if layer != 'last' else 'the last layer'}"
    caption = "Which share of the variance the k strongest directions hold together."
    caption += f" {about_data(source)}".rstrip()
    description = " ".join(
        f"At step {step(s)}: " + ", ".join(f"{v:.1%} in {k}" for k, v in sorted(readings[layer][s].items())) + "."
        for s in chosen
    )
    name = f"{run.ids}spectrum"
    svg = to_svg(figure, name=name, title=title, description=description)
    rows = [
        [place_name(n), step(s), *(f"{readings[n][s][k]:.1%}" if k in readings[n][s] else "" for k in sizes)]
        for n in layers
        for s in evenly(sorted(readings[n]), 3)
    ]
    yield Picture(name, title, caption, svg, ["layer", "step", *(f"k = {k}" for k in sizes)], rows, "")


def _layers(run: Run, metric: str) -> tuple[str | None, list[str]]:
    """Choose the data set that a metric is shown for (training before held-out data) and list its layers there."""
    for source in run.sources(metric):
        layers = [
            n for n in layers_only(run.places(metric, source)) if run.curve(Quantity(metric, n, source)).finite().values
        ]
        if layers:
            return source, layers
    return None, []
