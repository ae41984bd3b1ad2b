"""Renders a run as one HTML page."""

from __future__ import annotations

from typing import Any

from matent_callbacks.report._figures import pictures
from matent_callbacks.report._findings import missing, summary
from matent_callbacks.report._run import Run
from matent_callbacks.report._words import number, step


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
    return render(
        "page.html",
        run=run,
        steps=(step(run.steps[0]), step(run.steps[-1])),
        summary=summary(run),
        notes=[*run.notes, *missing(run)],
        sections={title: found for title, found in pictures(run).items() if found},
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


def render(template: str, **values: Any) -> str:
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
