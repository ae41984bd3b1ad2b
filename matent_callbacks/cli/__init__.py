"""The ``matent`` command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``matent`` with the arguments of the process, and leave it with the exit code of the command."""
    try:
        from matent_callbacks.cli._app import run

        # Within: the modules of a command are imported when it is called.
        code = run(sys.argv[1:])
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"matent: the command line needs {missing}: pip install 'matent-callbacks[cli]'")
    sys.exit(code)
