"""One page for a finished run, or for several side by side, in pictures and words: what ``matent report`` writes.

Reads what Trainers and loggers leave on disk; nothing is asked of any server, and no code or pickle of a run is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matent_callbacks.report._one_run import read
from matent_callbacks.report._pages import comparison, page
from matent_callbacks.report._run import Run, RunError, Stop

__all__ = ["Run", "RunError", "Stop", "comparison", "page", "read_run"]


def read_run(path: str | Path) -> Run:
    """Read a run, whichever way it was logged.

    Args:
        path: A Hugging Face output folder (``trainer_state.json`` in it or in a ``checkpoint-*``), the folder of
            Lightning's ``CSVLogger`` (``metrics.csv``), of a W&B run (``offline-run-*``) or of a TensorBoard log (event
            files), of which the first is read if there are several of one run; or one of these files.

    Returns:
        The run. Values have the names of the Hugging Face Trainer's record: ``loss``, ``effective_rank/last``,
        ``eval_effective_rank/last``.

    Raises:
        RunError: If there is no such folder, nothing in it is a run, or it holds several.

    Example:
        >>> from matent_callbacks.report import read_run
        >>> read_run("no/such/folder")
        Traceback (most recent call last):
        matent_callbacks.report._run.RunError: 'no/such/folder' does not exist.
    """
    # Resolved, since the run is named after its folder and `.` is no name.
    folder = Path(path).resolve()
    if not folder.exists():
        raise RunError(f"{str(path)!r} does not exist.")
    try:
        return replace(read(folder), path=folder)
    except RunError as error:
        raise type(error)(f"{str(path)!r} {error}.") from error
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
