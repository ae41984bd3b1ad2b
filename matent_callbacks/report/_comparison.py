"""Prepares what a page on several runs shows: their names and colours, and pictures with all of them in."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from matent_callbacks.plot._style import BLUE, FIVE, LOGARITHMIC, ORANGE, layer_ticks, rank_scale
from matent_callbacks.report._findings import ZERO, moved, without_zeros
from matent_callbacks.report._keys import Quantity
from matent_callbacks.report._pairs import Pairs
from matent_callbacks.report._picture import Picture, empty_figure, peaks, picture, style, table_over_steps
from matent_callbacks.report._run import Curve, Run
from matent_callbacks.report._words import (
    AXES,
    ENTROPIES,
    PAIRS,
    RANKS,
    about_data,
    capital,
    held_out_name,
    metric_name,
    number,
    pair_unit,
    place_name,
    step,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 12
_POINTS = 2400  # of all curves of a picture together
_MARKS = 4  # that a caption lists
# Six colours that the colour-blind can distinguish, too; then the same again, dashed.
_COLOURS = (BLUE, ORANGE, FIVE[3], FIVE[4], FIVE[0], FIVE[1])
_DASHED = (0, (4.0, 1.6))
_Item = TypeVar("_Item")


class Shared(NamedTuple):
    """One quantity of several runs: a curve for each of them, empty where it was not logged."""

    name: str
    title: str
    unit: str
    curves: list[Curve]
    ranks: bool = False
    lower_is_better: bool = False
    about: str = ""
    measured: Sequence[str] = ()
    """On what each run was measured, where that is not one and the same for all of them."""

    def label(self, place: int, name: str) -> str:
        """What the run of a name at a place of the page is called: with what it was measured on, if others differ."""
        return f"{name} ({self.measured[place]})" if self.measured else name


def line_style(place: int) -> tuple[str, bool]:
    """Colour of the run at a place of the page, and whether its lines are dashed."""
    return _COLOURS[place % len(_COLOURS)], place >= len(_COLOURS)


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs; equal ones with as much of their paths as distinguishes them."""
    names = [run.name for run in runs]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    parts = [run.path.parts if run.path else () for run in runs]
    found = []
    for i, (name, own) in enumerate(zip(names, parts, strict=True)):
        if name not in repeated:
            found.append(name)
            continue
        same = [other for j, other in enumerate(parts) if names[j] == name and j != i]
        enough = next((n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in same)), None)
        found.append(f"{name} ({'/'.join(own[-enough:])})" if enough else f"{name} ({names[: i + 1].count(name)})")
    return found


def quantities(runs: Sequence[Run]) -> list[Shared]:
    """Return what is compared, if any of the runs has logged it; last, what was logged under names."""
    found = _quantities(runs)
    for i, name in enumerate(sorted({name for run in runs for name in run.names})):
        for shared in _quantities([run.named(name) for run in runs]):
            found.append(shared._replace(name=f"named-{i}-{shared.name}", title=f"{name}: {shared.title}"))
    return found


def _quantities(runs: Sequence[Run]) -> list[Shared]:
    found = [_losses(runs, None, "loss", "Training loss")]
    for i, name in enumerate(sorted({name for run in runs for name in run.held_out_sets("loss")})):
        found.append(_losses(runs, name, f"loss-{i}", f"Loss, {held_out_name(name)}"))
    found += [shared for metrics in (ENTROPIES, RANKS) for shared in _last_layer(runs, metrics)]
    for place, title in PAIRS.items():
        source = _most(runs, operator.methodcaller("sources", "alignment", place))
        curves = [run.curve(Quantity("alignment", place, source)) for run in runs]
        about = f"Data: {Pairs([source]).name}."
        found.append(Shared(f"alignment-{place}", capital(title), pair_unit(place), curves, about=about))
    finite = [shared._replace(curves=[curve.finite() for curve in shared.curves]) for shared in found]
    return [shared for shared in finite if any(curve.steps for curve in shared.curves)]


def pictures(runs: Sequence[Run], names: Sequence[str], shared: Sequence[Shared]) -> list[Picture]:
    """One picture of each quantity over steps, and the profile through the depth at the end."""
    with style():
        found = [_over_steps(runs, names, quantity) for quantity in shared]
        # After the rank of the last layer.
        place = next((i + 1 for i, quantity in enumerate(shared) if quantity.ranks), len(found))
        found[place:place] = _profile(runs, names)
    return found


def first_at_best(curves: Sequence[Curve]) -> tuple[float, list[float | None]] | None:
    """The lowest value of the first run, and the step at which each run first was as low; none without a value."""
    if not curves[0].values:
        return None
    best = min(curves[0].values)
    return best, [next((s for s, v in zip(*curve, strict=True) if v <= best), None) for curve in curves]


def _losses(runs: Sequence[Run], held_out: str | None, name: str, title: str) -> Shared:
    curves = [run.curve(Quantity("loss", "", held_out)) for run in runs]
    kept = curves if held_out is not None else [without_zeros(curve) for curve in curves]
    about = f"Readings of exactly 0 are left out: {ZERO}." * (kept != curves)
    return Shared(name, title, AXES["loss"], kept, lower_is_better=True, about=about)


def _last_layer(runs: Sequence[Run], metrics: Sequence[str]) -> Iterator[Shared]:
    """The quantity of the last layer that most runs have, on the data on which most have it."""
    metric = _most(runs, lambda run: [m for m in metrics if run.shown(m)[1]])
    if metric is None:
        return
    source = _most(runs, lambda run: [source for source in run.sources(metric) if run.layers(metric, source)])
    last = [(run.layers(metric, source) or [""])[-1] for run in runs]
    curves = [run.curve(Quantity(metric, layer, source)) for run, layer in zip(runs, last, strict=True)]
    about, measured = _measured(runs, source, curves)
    different = sorted({layer for layer in last if layer})
    if different != ["last"]:
        about += f" The last layer that was read: {', '.join(different)}."
    title = f"{capital(metric_name(metric))}, last layer"
    ranks = metric in LOGARITHMIC
    yield Shared(metric, title, AXES.get(metric, metric), curves, ranks, about=about.strip(), measured=measured)


def _measured(runs: Sequence[Run], source: str | None, there: Sequence[Iterable[Any]]) -> tuple[str, list[str]]:
    """A sentence on the data that the runs are compared on, and for each run its own where they differ."""
    found = {run.measured for run, values in zip(runs, there, strict=True) if any(values)} if source is None else {""}
    if len(found) == 1:
        return about_data(source, *found), []
    warning = "Not all on the same data, as far as the logs say: see the legend."
    return warning, [f"on {run.measured}" if run.measured else "data not in its log" for run in runs]


def _most(runs: Sequence[Run], having: Callable[[Run], Iterable[_Item]]) -> _Item | None:
    """Return the item that ``having`` lists for most of the runs; the first of several."""
    counts: Counter[_Item] = Counter()
    for run in runs:
        counts.update(list(dict.fromkeys(having(run))))
    return max(counts, key=counts.__getitem__, default=None)


def _over_steps(runs: Sequence[Run], names: Sequence[str], shared: Shared) -> Picture:
    figure, ax = empty_figure()
    drawn = {i: shared.label(i, names[i]) for i, curve in enumerate(shared.curves) if curve.steps}
    limit = max(100, _POINTS // len(drawn))
    for i in drawn:
        curve = peaks(shared.curves[i], limit)
        colour = _draw(ax, i, *curve, marker="." if len(curve.steps) < 12 else "")
        for at in runs[i].alarm_steps:
            ax.axvline(at, color=colour, linestyle=(0, (1, 1)), linewidth=1.6)
        if stop := runs[i].stop:
            ax.axvline(stop.step, color=colour, linestyle=(0, (5, 3)), linewidth=1)
    ax.set_xlabel("step")
    ax.set_ylabel(shared.unit)
    if shared.ranks:
        rank_scale(ax)
    marks = [f"{names[i]}, {text}" for i in drawn for text in marked(runs[i])]
    if len(marks) > _MARKS:
        marks = ["alarms of a collapse (dotted) and plateaus (dashed), listed above"]
    thinned = any(len(curve.steps) > limit for curve in shared.curves)
    caption = [
        shared.about,
        _absent(names, drawn),
        "Of the longest only peaks and ends are drawn." if thinned else "",
        f"Marked: {'; '.join(marks)}." if marks else "",
    ]
    curves = {name: shared.curves[i] for i, name in drawn.items()}
    changes = [moved(name, curve) for name, curve in curves.items()]
    return picture(
        [figure], shared.name, shared.title, changes, table_over_steps(curves), caption, legend=False, runs=drawn
    )


def _draw(ax: Axes, place: int, x: Sequence[float], y: Sequence[float], **style: Any) -> str:
    """Draw a curve of the run at a place of the page, in its look, and return its colour."""
    colour, dashed = line_style(place)
    (line,) = ax.plot(x, y, color=colour, linestyle=_DASHED if dashed else "-", linewidth=1.5, **style)
    line.set_gid(f"run{place}")
    return colour


def _absent(names: Sequence[str], drawn: Container[int]) -> str:
    """A sentence on the runs that are not in a picture; empty if all are."""
    absent = [name for i, name in enumerate(names) if i not in drawn]
    return f"Not in the log of {_listed(absent)}." if absent else ""


def marked(run: Run) -> list[str]:
    """What is marked in a run: alarms dotted, the plateau dashed."""
    found = []
    if run.alarm_steps:
        more = f" to {step(run.alarm_steps[-1])}" if len(run.alarm_steps) > 1 else ""
        found.append(f"collapse at step {step(run.alarm_steps[0])}{more} ({_listed(list(run.alarms))}), dotted")
    return [*found, f"plateau at step {step(run.stop.step)}, dashed"] if run.stop else found


def _profile(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Picture]:
    """The rank through the layers at each run's last reading of all of them."""
    wanted = (*RANKS, *ENTROPIES)
    metric = _most(runs, lambda run: [m for m in wanted for s in run.sources(m) if len(run.layers(m, s)) > 1])
    if metric is None:
        return
    source = _most(runs, lambda run: [s for s in run.sources(metric) if len(run.layers(metric, s)) > 1])
    profiles: dict[int, dict[str, float]] = {}
    at: dict[int, float] = {}
    for i, run in enumerate(runs):
        curves = run.curves(metric, run.layers(metric, source), source)
        columns = {layer: dict(zip(*curve.finite(), strict=True)) for layer, curve in curves.items()}
        steps = Counter(s for column in columns.values() for s in column)
        if steps and max(steps.values()) > 1:
            at[i] = max(s for s, count in steps.items() if count == max(steps.values()))
            profiles[i] = {layer: column[at[i]] for layer, column in columns.items() if at[i] in column}
    if not profiles:
        return
    figure, ax = empty_figure()
    layers = list(dict.fromkeys(layer for profile in profiles.values() for layer in profile))
    alike = all(list(profile) == layers for profile in profiles.values())
    for i, profile in profiles.items():
        places = [j if alike else j / (len(profile) - 1) for j in range(len(profile))]
        _draw(ax, i, places, list(profile.values()), marker=".", ms=6)
    if alike:
        layer_ticks(ax.xaxis, layers, 10)
    else:
        ax.set_xlabel("depth: 0 the first layer, 1 the last")
    ax.set_ylabel(AXES.get(metric, metric))
    if metric in LOGARITHMIC:
        rank_scale(ax)
    ends = {step(value) for value in at.values()}
    when = f"At step {ends.pop()}." if len(ends) == 1 else "At each run's last reading."
    about, measured = _measured(runs, source, [profiles.get(i, {}) for i in range(len(runs))])
    labels = {i: f"{names[i]} ({measured[i]})" if measured else names[i] for i in profiles}
    headings = {i: f"{labels[i]}, step {step(at[i])}" for i in profiles}
    summaries = [
        f"{headings[i]}: {', '.join(f'{place_name(n)} {number(v)}' for n, v in profile.items())}."
        for i, profile in profiles.items()
    ]
    rows = [[place_name(n), *(number(p[n]) if n in p else "" for p in profiles.values())] for n in layers[::-1]]
    yield picture(
        [figure],
        "profile",
        f"{capital(metric_name(metric))} by depth, at the end",
        summaries,
        (["layer", *headings.values()], rows, ""),
        [when, about, _absent(names, profiles)],
        legend=False,
        runs=labels,
    )


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items) if len(items) <= 3 else f"{', '.join(items[:2])} and {len(items) - 2} more"
