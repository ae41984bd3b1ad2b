"""The commands of ``matent``; the module of a command is imported when the command is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from matent_callbacks import __version__

_COMMANDS = {
    "measure": "Measure matrix entropy and effective rank of models over text.",
    "scaling": "Fit the scaling law to what `matent measure` found.",
    "report": "Make one HTML page of a finished training run.",
}


class _Later(TyperCommand):
    """A command of which only name and summary are loaded until it is called."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module = importlib.import_module(f"matent_callbacks.cli.{self.name}")
        app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        app.command(self.name)(getattr(module, str(self.name)))
        return get_command(app).make_context(info_name, args, parent=parent, **extra)


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update({name: _Later(name=name, help=summary) for name, summary in _COMMANDS.items()})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"matent {__version__}")
        raise typer.Exit


@app.callback()
def _matent(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """See what representations do: matrix entropy and effective rank of any model, scaling laws, reports of runs.

    `matent COMMAND --help` shows the options of a command, with examples.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; bad arguments give 2 and one sentence on stderr."""
    command = get_command(app)
    try:
        code = command.main(args=list(arguments), prog_name="matent", standalone_mode=False)
    except typer.Abort:
        return 130
    except Exception as error:
        # Typer has its own copies of click's exceptions, recognised here by the method they have.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(str(error.format_message()).split()).removeprefix("Invalid value: ")
        if message:
            print(f"matent: {message}", file=sys.stderr)
        return int(error.exit_code)  # type: ignore[attr-defined]
    return code if isinstance(code, int) else 0
