"""One page for a finished run, or for several side by side, in pictures and words: what ``matent report`` writes.

Reads what Trainers and loggers leave on disk; nothing is asked of any server, and no code or pickle of a run is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matent_callbacks.report import _csv_log, _huggingface, _tensorboard, _wandb
from matent_callbacks.report._comparison_page import comparison
from matent_callbacks.report._page import page
from matent_callbacks.report._run import NoRunError, Run, RunError, Stop

__all__ = ["Run", "RunError", "Stop", "comparison", "page", "read_run"]

_READERS = (
    (_huggingface.find, _huggingface.read),
    (_csv_log.find, _csv_log.read),
    (_wandb.find, _wandb.read),
    (_tensorboard.find, _tensorboard.read),
)


def read_run(path: str | Path) -> Run:
    """Read a run, whichever way it was logged.

    Args:
        path: A Hugging Face output folder (``trainer_state.json`` in it or in a ``checkpoint-*``), the folder of
            Lightning's ``CSVLogger`` (``metrics.csv``), of a W&B run (``offline-run-*``) or of a TensorBoard log (event
            files), looked for in this order; or one of these files.

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
        for find, read in _READERS:
            files = find(folder)
            if files:
                return replace(read(folder, files), path=folder)
    except RunError as error:
        raise RunError(f"{str(path)!r} {error}.") from error
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    raise NoRunError(
        f"{str(path)!r} is no run that can be read: expected trainer_state.json or checkpoint-* (Hugging Face), "
        "metrics.csv (Lightning), event files (TensorBoard) or run-*.wandb (W&B) in it."
    )
