"""Renders several runs as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matent_callbacks.report._comparison import (
    MOST_RUNS,
    Shared,
    first_at_best,
    labels,
    look,
    marked,
    pictures,
    quantities,
)
from matent_callbacks.report._page import render
from matent_callbacks.report._picture import css_colour
from matent_callbacks.report._run import Run
from matent_callbacks.report._settings import differing
from matent_callbacks.report._words import number, step

_MOST_SETTINGS = 100


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
    names = labels(runs)
    left_out = names[MOST_RUNS:]
    all_of, runs, names = len(runs), runs[:MOST_RUNS], names[:MOST_RUNS]
    shared = quantities(runs)
    settings = differing(runs)
    return render(
        "comparison.html",
        title=f"{names[0]} and {names[1]}" if all_of == 2 else f"{all_of} runs side by side",
        left_out=f"Shown are the first {MOST_RUNS}; left out: {', '.join(left_out)}." if left_out else "",
        runs=[_described(i, run, name) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        pictures=pictures(runs, names, shared),
        groups=[_group(quantity) for quantity in shared],
        first=names[0],
        settings=dict(list(settings.items())[:_MOST_SETTINGS]),
        settings_note=_about_settings(runs, names, settings),
    )


def _described(place: int, run: Run, label: str) -> dict[str, Any]:
    colour, dashed = look(place)
    return {
        "label": label,
        "colour": css_colour(colour),
        "dashed": dashed,
        "source": run.source,
        "steps": (step(run.steps[0]), step(run.steps[-1])),
        "notes": [*run.notes, *(f"Marked: {text}." for text in marked(run))],
    }


def _group(shared: Shared) -> dict[str, Any]:
    """The rows of one quantity: each run's last, lowest and highest value, and when it was as good as the first."""
    best, reached = (shared.lower_is_better and first_at_best(shared.curves)) or (None, [])
    rows = []
    for place, (steps, values) in enumerate(shared.curves):
        if values:
            cells = [number(values[-1])]
            for value in (min(values), max(values)):
                cells += [number(value), step(steps[values.index(value)])]
            at = reached[place] if reached else None
            rows.append((place, [*cells, "" if best is None else "never" if at is None else step(at)]))
    return {"title": shared.title, "best": "" if best is None else f"at or below {number(best)}", "rows": rows}


def _about_settings(runs: Sequence[Run], names: Sequence[str], settings: dict[str, list[str | None]]) -> str:
    unknown = [name for run, name in zip(runs, names, strict=True) if not run.settings]
    if len(runs) - len(unknown) < 2:
        return "The logs of fewer than two of the runs know their settings, so there is nothing to compare."
    told = f" The logs of {', '.join(unknown)} know none." if unknown else ""
    if not settings:
        return f"All settings that the logs know are the same.{told}"
    cut = f" Shown are {_MOST_SETTINGS} of {len(settings)}." if len(settings) > _MOST_SETTINGS else ""
    return f"As far as the logs know them; what is the same in all runs is left out.{told}{cut}"
