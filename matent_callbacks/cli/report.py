"""``matent report``: one page for one run, or for several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from matent_callbacks.report import Run


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Output folder of a Hugging Face Trainer, or the folder of Lightning's CSV log, of a TensorBoard log, "
            "or of a W&B run on this disk. Several: one page with the runs side by side.",
        ),
    ],
    every: Annotated[
        bool, typer.Option("--all", help="RUN is a folder of runs: all runs in it, side by side.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("report.html"),
) -> None:
    """Write one HTML page about a finished run, or one that was cut off, or about several side by side.

    It shows in pictures and in words what changed; each of several runs has the same colour in every picture.

    The page needs nothing else: no network, no script, no other file.
    """
    from matent_callbacks._files import write_atomically
    from matent_callbacks.report import RunError, comparison, page, read_run

    if out.is_dir():
        raise typer.BadParameter(f"{str(out)!r} is a folder; expected the file to write.", param_hint="'--out'")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"There is no folder {str(out.parent)!r} to write into.", param_hint="'--out'")
    damaged: list[str] = []
    try:
        found = [run for folder in runs for run in _all_in(folder, damaged)] if every else [*map(read_run, runs)]
    except RunError as error:
        raise typer.BadParameter(str(error), param_hint="'RUN'") from error
    for sentence in damaged:
        typer.echo(f"Left out: {sentence}", err=True)
    if not found:
        raise typer.BadParameter(f"There is no run that can be read in {str(runs[0])!r}.", param_hint="'RUN'")
    try:
        html = page(found[0]) if len(found) == 1 else comparison(found)
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        typer.echo(f"{error}: the page needs {missing}: pip install 'matent-callbacks[cli]'", err=True)
        raise typer.Exit(1) from error
    try:
        if out.exists() and not out.is_file():  # such as /dev/stdout
            out.write_text(html, encoding="utf-8")
        else:
            write_atomically(out, html.encode())
    except OSError as error:
        raise typer.BadParameter(f"{str(out)!r} cannot be written: {error.strerror}.", param_hint="'--out'") from error
    for run in found:
        typer.echo(f"{out}: steps {run.steps[0]} to {run.steps[-1]} of {run.name}")
    if damaged:
        raise typer.Exit(1)


def _all_in(folder: Path, damaged: list[str]) -> list[Run]:
    """Read the runs in the subfolders, in natural order of their names; ``damaged`` gets why others are left out."""
    from matent_callbacks.report import RunError
    from matent_callbacks.report._one_run import read_all

    if not folder.is_dir():
        raise RunError(f"{str(folder)!r} is no folder of runs.")
    found: list[Run] = []
    for run in read_all(folder.resolve()):
        if isinstance(run, RunError):
            damaged.append(str(run))
        else:
            found.append(run)
    return found
