"""Tells whether a folder holds one run, however many logs of it there are, or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from matent_callbacks.plot._style import numbers_as_numbers
from matent_callbacks.report import _csv_log, _huggingface, _tensorboard, _wandb
from matent_callbacks.report._run import NoRunError, Run, RunError, SeveralRunsError
from matent_callbacks.report._words import listed

_MODULES = (_huggingface, _csv_log, _wandb, _tensorboard)


class _Log(NamedTuple):
    """What one reader found in a folder."""

    folder: Path
    files: list[Path]
    read: Callable[[Path, list[Path]], Run]
    name: str
    """What the user may name to have this one read, as seen from the folder that is searched."""


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
        return replace(_read(folder), path=folder)
    except RunError as error:
        raise type(error)(f"{str(path)!r} {error}.") from error
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def _read(path: Path) -> Run:
    """Read the run of a folder or a file; the messages of errors go on from the path."""
    inside = {folder: log for folder in _subfolders(path) if (log := _first_log(folder))}
    own = list(_own_logs(path, inside))
    if not own:
        raise _no_run([log.name for log in inside.values()])
    first, *others = own
    try:
        run = first.read(path, first.files)
    except SeveralRunsError as error:
        names = _places(path, first.files)
        helps = len(names) > 1 and all(file.parent.parent == path for file in first.files)
        if len(names) == 1:
            names = [str(file.relative_to(path)) for file in first.files]
        seen = {file for log in own for file in log.files}
        beside = [log.name for log in (*others, *inside.values()) if log in others or seen.isdisjoint(log.files)]
        raise RunError(
            f"holds {len(names)} {error}: name one of {', '.join(names)}{', or all with --all' * helps}"
            + f". It also holds logs of other kinds: {', '.join(beside)}" * bool(beside)
        ) from error
    seen = {file for log in own for file in log.files}
    others += [log for log in inside.values() if not seen.issuperset(log.files)]
    notes, different = [], []
    for log in others:
        if _is_own_tensorboard(first, log):
            continue
        try:
            same = _is_same(run, log)
        except RunError as error:
            notes.append(f"Beside it lies {log.name}, which {error}; it is left out.")
            continue
        if same:
            notes.append(f"The run is also logged in {log.name}; what is shown is from {first.name}.")
        else:
            different.append(log)
    if different:
        names = list(dict.fromkeys(log.name for log in (first, *different)))
        raise RunError(f"holds {len(names)} runs: name one of {listed(names)}")
    return replace(run, notes=[*run.notes, *notes])


def read_all(path: Path) -> Iterator[Run | RunError]:
    """Read the runs among the subfolders of a folder, in natural order of their names, and a Trainer's run of its own.

    What is no run is left out; a run that cannot be read is its error.
    """
    states = _huggingface.find(path)
    for folder in ([path] if states else []) + _subfolders(path):
        try:
            found = _huggingface.read(path, states) if folder == path else _read(folder)
        except NoRunError:
            continue
        except RunError as error:
            yield RunError(f"{str(folder)!r} {error}.")
        else:
            yield replace(found, path=folder)


def _subfolders(path: Path) -> list[Path]:
    """Return the folders in which further runs may lie: not checkpoints, which belong to the run of the folder."""
    if not path.is_dir():
        return []
    inside = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    # W&B has a link to the latest of its runs beside them.
    real = {path, *path.parents, *(p for p in inside if not p.is_symlink())}
    inside = [p for p in inside if not (_huggingface.is_checkpoint(p) or (p.is_symlink() and p.resolve() in real))]
    return sorted(inside, key=lambda p: numbers_as_numbers(p.name))


def _first_log(folder: Path) -> _Log | None:
    found = ((module.read, module.find(folder)) for module in _MODULES)
    return next((_Log(folder, files, read, folder.name) for read, files in found if files), None)


def _own_logs(path: Path, inside: dict[Path, _Log]) -> Iterator[_Log]:
    """Return the logs of the run whose folder this is: without those that readers find in a subfolder's own run."""
    for module in _MODULES:
        files = [f for f in module.find(path) if all(log.read is module.read for log in _above(f, inside))]
        if not files or (module in (_csv_log, _tensorboard) and _is_of_several(files)):
            continue
        places = _places(path, files)
        yield _Log(path, files, module.read, places[0] if module is _huggingface else listed(places))


def _places(path: Path, files: list[Path]) -> list[str]:
    """Return what the user may name to have logs read: their folders, or files that are in the folder itself."""
    return list(
        dict.fromkeys(f.name if f.parent == path or f == path else str(f.parent.relative_to(path)) for f in files)
    )


def _above(file: Path, inside: dict[Path, _Log]) -> list[_Log]:
    return [inside[folder] for folder in file.parents if folder in inside]


def _is_of_several(files: list[Path]) -> bool:
    """Whether logs are not beside one another, as the parts of a resumed run are; or below one of them."""
    folders = {file.parent for file in files}
    return len({folder.parent for folder in folders if folders.isdisjoint(folder.parents)}) > 1


def _is_own_tensorboard(first: _Log, log: _Log) -> bool:
    """Whether these are event files where the Hugging Face Trainer itself writes them."""
    own = first.folder / "runs"
    return first.read is _huggingface.read and all(own in file.parents for file in log.files)


def _is_same(run: Run, log: _Log) -> bool:
    """Whether a log has the readings of ``run``: more than half of those that both have, since a part may be older.

    Runs from one seed have their first readings in common.
    """
    try:
        parts = [log.read(log.folder, log.files)]
    except RunError:
        if len(log.files) == 1:
            raise
        # Attempts that do not continue one another, each of which may be a part of the run.
        parts = [log.read(file.parent, [file]) for file in log.files]
    return all(_agree(run, part) for part in parts)


def _agree(one: Run, other: Run) -> bool:
    equal = common = 0
    for key in one.columns.keys() & other.columns.keys():
        values = dict(zip(*other.columns[key], strict=True))
        for step, value in zip(*one.columns[key], strict=True):
            if step in values and math.isfinite(value) and math.isfinite(values[step]):
                common += 1
                equal += math.isclose(value, values[step], rel_tol=1e-4, abs_tol=1e-6)
    return equal > common / 2


def _no_run(folders: list[str]) -> RunError:
    if folders:
        return RunError(
            f"is no run that can be read, but holds folders of runs: name one of {listed(folders)}, or all with --all"
        )
    return NoRunError(
        "is no run that can be read: expected trainer_state.json or checkpoint-* (Hugging Face), metrics.csv "
        "(Lightning), event files (TensorBoard) or run-*.wandb (W&B) in it"
    )
