"""Renders a run, or several side by side, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matent_callbacks.report import _comparison, _figures
from matent_callbacks.report._findings import missing, summary
from matent_callbacks.report._picture import css_colour
from matent_callbacks.report._run import Run
from matent_callbacks.report._settings import differing
from matent_callbacks.report._words import number, step

_MOST_SETTINGS = 100


def page(run: Run) -> str:
    """Render a run as one HTML page that needs nothing else: no network, no script, no other file.

    Args:
        run: What :func:`~matent_callbacks.report.read_run` returned.

    Returns:
        The page. Whatever the run provides (its name, its keys) is in it as text.

    Raises:
        ValueError: If the run has no records.
        ImportError: If matplotlib or jinja2 is not installed.

    Example:
        >>> from matent_callbacks.report import Run, page
        >>> html = page(Run("run <1>", "by hand", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]))
        >>> "<h1>run &lt;1&gt;</h1>" in html, "fell from 2 at step 1 to 1.5 at step 2, by 0.5" in html
        (True, True)
    """
    if not run.records:
        raise ValueError("`run` must have at least one record, and it has none.")
    return _render(
        "page.html",
        run=run,
        steps=(step(run.steps[0]), step(run.steps[-1])),
        summary=summary(run),
        notes=[*run.notes, *missing(run)],
        sections={title: found for title, found in _figures.pictures(run).items() if found},
        logged=_logged(run),
    )


def _logged(run: Run) -> list[list[str]]:
    """List every name in the log with its number of readings, and its first, last, lowest and highest value."""
    rows = []
    for key, curve in sorted(run.columns.items()):
        finite = curve.finite().values
        shown = [finite[0], finite[-1], min(finite), max(finite)] if finite else []
        rows.append([key, f"{len(curve.values):,}", *(map(number, shown) if shown else [""] * 4)])
    return rows


def comparison(runs: Sequence[Run]) -> str:
    """Several runs side by side as one HTML page that needs nothing else: no network, no script, no other file.

    Each run has one colour, the same in every picture. Of more than twelve runs the first twelve are shown, and the
    page says so.

    Args:
        runs: What :func:`~matent_callbacks.report.read_run` returned; the others are compared with the first.

    Returns:
        The page. Whatever the runs provide (names, keys, settings) is in it as text.

    Raises:
        ValueError: If there are fewer than two runs, or one has no records.
        ImportError: If matplotlib or jinja2 is not installed.

    Example:
        >>> from matent_callbacks.report import Run, comparison
        >>> runs = [Run(name, "by hand", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]) for name in ("a", "b")]
        >>> "<h1>a and b</h1>" in comparison(runs)
        True
    """
    if len(runs) < 2:
        raise ValueError(f"`runs` must be at least two runs, got {len(runs)}.")
    for run in runs:
        if not run.records:
            raise ValueError(f"`runs` must have at least one record each, and {run.name!r} has none.")
    names = _comparison.labels(runs)
    left_out = names[_comparison.MOST_RUNS :]
    all_of, runs, names = len(runs), runs[: _comparison.MOST_RUNS], names[: _comparison.MOST_RUNS]
    shared = _comparison.quantities(runs)
    settings = differing(runs)
    return _render(
        "comparison.html",
        title=f"{names[0]} and {names[1]}" if all_of == 2 else f"{all_of} runs side by side",
        left_out=f"Shown are the first {_comparison.MOST_RUNS}; left out: {', '.join(left_out)}." if left_out else "",
        runs=[_described(i, run, name) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        pictures=_comparison.pictures(runs, names, shared),
        groups=[_group(quantity, names) for quantity in shared],
        first=names[0],
        settings=dict(list(settings.items())[:_MOST_SETTINGS]),
        settings_note=_about_settings(runs, names, settings),
    )


def _described(place: int, run: Run, label: str) -> dict[str, Any]:
    colour, dashed = _comparison.line_style(place)
    return {
        "label": label,
        "colour": css_colour(colour),
        "dashed": dashed,
        "source": run.source,
        "steps": (step(run.steps[0]), step(run.steps[-1])),
        "notes": [*run.notes, *(f"Marked: {text}." for text in _comparison.marked(run))],
    }


def _group(shared: _comparison.Shared, names: Sequence[str]) -> dict[str, Any]:
    """The rows of one quantity: each run's last, lowest and highest value, and when it was as good as the first."""
    best, reached = (shared.lower_is_better and _comparison.first_at_best(shared.curves)) or (None, [])
    rows = []
    for place, (steps, values) in enumerate(shared.curves):
        if values:
            cells = [number(values[-1])]
            for value in (min(values), max(values)):
                cells += [number(value), step(steps[values.index(value)])]
            at = reached[place] if reached else None
            rows.append(
                (
                    place,
                    shared.label(place, names[place]),
                    [*cells, "" if best is None else "never" if at is None else step(at)],
                )
            )
    return {"title": shared.title, "best": "" if best is None else f"at or below {number(best)}", "rows": rows}


def _about_settings(runs: Sequence[Run], names: Sequence[str], settings: dict[str, list[str | None]]) -> str:
    unknown = [name for run, name in zip(runs, names, strict=True) if not run.settings]
    if len(runs) - len(unknown) < 2:
        return "The logs of fewer than two of the runs know their settings, so there is nothing to compare."
    not_known = f" The logs of {', '.join(unknown)} know none." if unknown else ""
    if not settings:
        return f"All settings that the logs know are the same.{not_known}"
    cut = f" Shown are {_MOST_SETTINGS} of {len(settings)}." if len(settings) > _MOST_SETTINGS else ""
    return f"As far as the logs know them; what is the same in all runs is left out.{not_known}{cut}"


def _render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; all values are escaped, except the SVG of pictures."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("matent_callbacks.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
