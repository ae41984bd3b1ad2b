"""``matent scaling``: the power law of a family of models, from what ``matent measure`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from matent_callbacks.scaling_law import Estimate, PowerLaw


# Settings of `matent measure` that change no value.
_HARMLESS = {"baseline", "batch_tokens", "replicates"}


class Size(StrEnum):
    """What is taken as the size of a model."""

    parameters = "parameters"
    steps = "steps"
    tokens = "tokens"


class _Point(NamedTuple):
    model: str
    x: float
    value: float
    low: float  # the value itself where there is no interval
    high: float


def scaling(
    results: Annotated[list[Path], typer.Argument(help="Files that `matent measure --out` wrote.", show_default=False)],
    x: Annotated[Size, typer.Option("--x", help="The size N.")] = Size.parameters,
    y: Annotated[
        str,
        typer.Option("--y", help="The quantity H. The default is over log d, so that models of any width compare."),
    ] = "normalized_sequence_matrix_entropy",
    layer: Annotated[str, typer.Option(help="The layer, as the results name it.")] = "last",
    plot: Annotated[
        Path | None,
        typer.Option(help="Where to draw the points and the curve: .png, .svg, .pdf.", show_default=False),
    ] = None,
) -> None:
    """Fit H(N) = a N^-b and H(N) = a N^-b + c to measured models, and say which the points support.

    Every model counts the same: the intervals of a measurement come from the choice of texts, which is the same for
    all models, and say nothing about how far a model lies off the curve. They are drawn, not used as weights. The noise
    is estimated from the residuals; intervals of a, b and c are 95 % profile likelihood; the form is chosen by AICc.

    The law of what `matent measure --out results.json` found, with its picture:

        matent scaling results.json --plot law.png

    Exits with 1, and fits nothing, if there are fewer than three sizes or the values do not fall.
    """
    points = _points(results, x.value, y, layer)
    try:
        from matent_callbacks.scaling_law import fit_power_laws
    except ModuleNotFoundError as error:
        _fail(f"The fit needs {str(error.name).partition('.')[0]}: pip install 'matent-callbacks[cli]'")
    try:
        fits = fit_power_laws([point.x for point in points], [point.value for point in points])
    except ValueError as error:
        fits, refusal = (), str(error)
    if points:
        _print(points, fits, x.value, y, layer)
    if points and plot is not None:
        _draw(points, fits, x.value, y, layer, plot)
    if not fits:
        names = [point.model for point in points]
        instead = f" To compare two models: matent measure {names[1]} --baseline {names[0]}" if len(names) == 2 else ""
        _fail(f"Nothing was fitted. {refusal}{instead}")


def _points(paths: Iterable[Path], x: str, y: str, layer: str) -> list[_Point]:
    """Return the measured models, and print which are left out and why."""
    documents = [_read(path) for path in paths]
    _compare([_mapping(document, "settings") for document in documents])
    # A model that is in several files counts once, or its point would weigh twice.
    models = {(str(model.get("model")), str(model.get(x))): model for doc in documents for model in doc["models"]}
    points, without_size, unfinished = [], list[str](), list[str]()
    seen_layers, seen_values = set[str](), set[str]()
    for (name, _), model in models.items():
        size, layers = model.get(x), _mapping(model, "layers")
        seen_layers |= layers.keys()
        seen_values |= _mapping(layers, layer).keys()
        entry = _mapping(_mapping(layers, layer), y)
        if not _is_number(entry.get("value")):
            unfinished.append(name)
        elif not _is_number(size) or size <= 0:
            without_size.append(name)
        else:
            points.append(_Point(name, size, *(_end(entry, end) for end in ("value", "low", "high"))))
    if seen_layers and layer not in seen_layers:
        _refuse(f"no model has the layer {layer!r}; there are: {', '.join(sorted(seen_layers))}.", "--layer")
    if seen_values and y not in seen_values:
        _refuse(f"no model has {y!r} at layer {layer}; there are: {', '.join(sorted(seen_values))}.", "--y")
    if unfinished:
        typer.echo(f"Left out, without a value of {y} at layer {layer}: {', '.join(unfinished)}.", err=True)
    if without_size:
        typer.echo(f"Left out, without a positive number of {x}: {', '.join(without_size)}.", err=True)
    return sorted(points, key=lambda point: point.x)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        _refuse(
            f"{path} is a folder; expected a file that `matent measure --out` wrote. To compare two models: "
            "matent measure A B --baseline A",
            "RESULTS",
        )
    except OSError as error:
        _refuse(f"{path} cannot be read: {error.strerror}.", "RESULTS")
    except ValueError:  # also of what is not UTF-8
        _refuse(f"{path} is not JSON; expected what `matent measure --out` writes.", "RESULTS")
    models = document.get("models") if isinstance(document, dict) else None
    known = isinstance(models, list) and document.get("format") == "matent-measure" and document.get("version") == 1
    if not known or not all(isinstance(model, dict) for model in models or ()):
        _refuse(f"{path} is not what `matent measure --out` writes (format matent-measure, version 1).", "RESULTS")
    return dict(document)


def _compare(settings: list[dict[str, Any]]) -> None:
    """Print a warning if the files were measured with different settings."""
    names = sorted({name for one in settings for name in one} - _HARMLESS)
    differing = [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
    if differing:
        typer.echo(f"The files differ in {', '.join(differing)}: their values may not be comparable.", err=True)


def _mapping(document: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an entry that should be a mapping; an empty one if it is missing or anything else."""
    entry = document.get(key)
    return entry if isinstance(entry, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _end(entry: dict[str, Any], end: str) -> float:
    return float(entry[end] if _is_number(entry.get(end)) else entry["value"])


def _print(points: list[_Point], fits: tuple[PowerLaw, ...], x: str, y: str, layer: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # As wide as needed where the output goes to a program or a file.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    table = Table("model", title=f"{y}, layer {layer}")
    for heading in (x, "value", "95 % interval", *(["curve", "off by"] if fits else [])):
        table.add_column(heading, justify="right")
    for point in points:
        interval = f"{point.low:.4f} to {point.high:.4f}"
        fitted = [f"{fits[0](point.x):.4f}", f"{point.value - fits[0](point.x):+.4f}"] if fits else []
        table.add_row(escape(point.model), f"{point.x:,.0f}", f"{point.value:.4f}", interval, *fitted)
    console.print(table)
    if not fits:
        return
    forms = Table("form", title="Fits, with 95 % intervals (profile likelihood), the chosen one first")
    for heading in ("a", "b", "c", "residual s.d.", "AICc"):
        forms.add_column(heading, justify="right")
    for fit in fits:
        aicc = "-" if fit.aicc is None else f"{fit.aicc:.1f}"
        form = "a N^-b" if fit.c is None else "a N^-b + c"
        forms.add_row(form, _show(fit.a), _show(fit.b), _show(fit.c) if fit.c else "0", f"{fit.deviation:.2g}", aicc)
    console.print(forms)
    if len(fits) == 1:
        console.print("The form a N^-b + c needs at least six points, and was not tried.")
    if fits[0].b.low == 0:
        console.print("The interval of b reaches down to 0: these points do not show that the values fall.")


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def _draw(points: list[_Point], fits: tuple[PowerLaw, ...], x: str, y: str, layer: str, path: Path) -> None:
    try:
        import matplotlib

        from matent_callbacks.plot import scaling_law
    except ModuleNotFoundError as error:
        _fail(f"The picture needs {str(error.name).partition('.')[0]}: pip install 'matent-callbacks[plot]'")
    matplotlib.use("agg")
    names = [point.model.rstrip("/").rsplit("/", 1)[-1] for point in points]
    figure = scaling_law(
        [point.x for point in points],
        [point.value for point in points],
        fit=fits[0] if fits else None,
        intervals=[(point.low, point.high) for point in points],
        names=names,
        size=x,
        metric=y,
        title=f"Layer {layer}",
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        _fail(f"{path} cannot be written: {error}")
    typer.echo(f"Picture: {path}")


def _refuse(message: str, argument: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=argument)


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
