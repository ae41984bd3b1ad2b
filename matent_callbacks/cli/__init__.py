"""The ``matent`` command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``matent`` with the arguments of the process, and leave it with the exit code of the command."""
    try:
        from matent_callbacks.cli._app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"matent: the command line needs {error.name}: pip install 'matent-callbacks[cli]'")
    sys.exit(run(sys.argv[1:]))
