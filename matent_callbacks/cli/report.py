"""``matent report``: one page for one run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Output folder of a Hugging Face Trainer, or the folder of Lightning's CSV log, of a TensorBoard log, "
            "or of a W&B run on this disk.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("report.html"),
) -> None:
    """Write one HTML page about a finished run, or one that was cut off: what moved, in pictures and in words.

    The page needs nothing else: no network, no script, no other file.
    """
    from matent_callbacks.report import RunError, page, read_run

    if out.is_dir():
        raise typer.BadParameter(f"{str(out)!r} is a folder; expected the file to write.", param_hint="'--out'")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"There is no folder {str(out.parent)!r} to write into.", param_hint="'--out'")
    try:
        found = read_run(run)
    except RunError as error:
        raise typer.BadParameter(str(error), param_hint="'RUN'") from error
    try:
        html = page(found)
    except ImportError as error:
        typer.echo(f"{error}: the pictures need matplotlib: pip install 'matent-callbacks[plot]'", err=True)
        raise typer.Exit(1) from error
    try:
        _write(out, html)
    except OSError as error:
        raise typer.BadParameter(f"{str(out)!r} cannot be written: {error.strerror}.", param_hint="'--out'") from error
    typer.echo(f"{out}: steps {found.steps[0]} to {found.steps[-1]} of {found.name}")


def _write(out: Path, html: str) -> None:
    """All or nothing: an earlier page stays where the new one cannot be written."""
    if out.exists() and not out.is_file():  # such as /dev/stdout
        out.write_text(html, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is for its owner only
        os.replace(name, out)
    except OSError:
        os.unlink(name)
        raise
