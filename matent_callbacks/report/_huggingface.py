"""Reads the output folder of a Hugging Face Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matent_callbacks.plateau import PlateauDetector
from matent_callbacks.report._run import Part, Run, RunError, Stop, join, to_record
from matent_callbacks.report._settings import SETTINGS, first_known, flat, sinks_setting
from matent_callbacks.report._words import step as at

_STATE = "trainer_state.json"


def find(path: Path) -> list[Path]:
    """Find the ``trainer_state.json`` files of a folder, that of the newest checkpoint first."""
    if path.is_file():
        return [path] * (path.name == _STATE)
    checkpoints = [p for p in path.glob(f"checkpoint-*/{_STATE}") if is_checkpoint(p.parent)]
    checkpoints.sort(key=lambda p: int(p.parent.name[11:]), reverse=True)
    return [p for p in [path / _STATE] if p.is_file()] + checkpoints


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint, and so is a part of the run of the folder above."""
    return folder.name.startswith("checkpoint-") and folder.name[11:].isdigit()


def read(path: Path, files: list[Path]) -> Run:
    """Read the log with the most steps; of two with equally many, the folder's own."""
    states: list[tuple[Path, dict[str, Any]]] = []
    notes = []
    # Of the checkpoints only the newest that can be read: each holds all of the records before it.
    for file in files:
        if states and is_checkpoint(file.parent) and is_checkpoint(states[-1][0].parent):
            break
        try:
            states.append((file, _load(file)))
        except RunError as error:
            if len(files) == 1:
                raise
            notes.append(f"{error}; it is left out.".replace("holds", f"{path.name} holds", 1))
    if not states:
        raise RunError("holds no trainer_state.json that can be read")
    file, state = max(states, key=lambda item: item[1]["global_step"])
    history = [record for record in state["log_history"] if isinstance(record, dict)]
    records = [record for entry in history if (record := to_record(entry.get("step"), _without_averages(entry)))]
    joined, gaps = join([Part(file.parent.name, records)])
    stop, end = _end(state, history)
    name = path.name if path.is_dir() else path.parent.name
    where = file.relative_to(path) if path.is_dir() else file.name
    notes = [end, *_started_again(history), *gaps, *notes]
    model = first_known([file.parent, *(other.parent for other in files)])
    kept = _dict(_dict(state.get("stateful_callbacks")).get(SETTINGS))
    settings = {**model, **flat(kept), **_sinks(state)}
    return Run(name, f"Hugging Face Trainer, {where}", joined, notes, stop, settings)


def _sinks(state: dict[str, Any]) -> dict[str, str]:
    """Whether attention sinks are left out, of callbacks with a ``reference``, which note what it was measured with."""
    found = {}
    for saved in _dict(_dict(state.get("stateful_callbacks")).get("matent_callbacks")).values():
        of = _dict(_dict(saved).get("reference_of"))
        left_out = _dict(of.get("settings")).get("exclude_sinks")
        if isinstance(left_out, bool):
            found.update({sinks_setting(prefix.rstrip("/")): str(left_out) for prefix in _dict(of.get("probes"))})
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"holds a {file.parent.name}/{file.name} that is damaged or was cut off while it was written"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise RunError(
            f"holds a {file.parent.name}/{file.name} that is not the state of a Trainer: it has no log_history"
        )
    state["global_step"] = state["global_step"] if isinstance(state.get("global_step"), int) else 0
    return state


def _without_averages(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop the final record's averages over the whole run, which are not readings of that step."""
    return {key: value for key, value in entry.items() if key != "train_loss"} if "train_runtime" in entry else entry


def _started_again(history: list[dict[str, Any]]) -> list[str]:
    ends = sorted({entry["step"] for entry in history if "train_runtime" in entry and "step" in entry})
    last = max((entry["step"] for entry in history if "step" in entry), default=0)
    return [f"Training ended at step {at(step)} and was started again." for step in ends if step < last]


def _end(state: dict[str, Any], history: list[dict[str, Any]]) -> tuple[Stop | None, str]:
    """Tell from the state how the run ended: the plateau that stopped it, if any, and one sentence."""
    step, planned = state["global_step"], state.get("max_steps")
    if not isinstance(planned, int) or planned <= 0:
        return None, f"The record ends at step {at(step)}; how many steps were planned is not in it."
    if step >= planned:
        return None, f"The run made all of its {at(planned)} steps."
    callbacks = _dict(state.get("stateful_callbacks"))
    asked_to_stop = _dict(_dict(callbacks.get("TrainerControl")).get("args")).get("should_training_stop") is True
    returned = any("train_runtime" in entry and entry.get("step") == step for entry in history)
    if not (asked_to_stop or returned):
        return None, (
            f"The record ends at step {at(step)} of {at(planned)}: the run was cut off or stopped after that, or is "
            "still running. What came after the last checkpoint is not in it."
        )
    for name, saved in _dict(callbacks.get("matent_callbacks")).items():
        stop = _plateau(name, saved)
        if stop is not None and stop.step == step:
            return stop, f"The run was stopped at step {at(step)} of {at(planned)} by PlateauStopping."
    return None, f"The run was stopped at step {at(step)} of {at(planned)}; by which callback is not in the record."


def _plateau(name: str, saved: Any) -> Stop | None:
    if not name.startswith("PlateauStopping("):
        return None
    try:
        detector = PlateauDetector(**saved["settings"])
        detector.load_state_dict(saved)
        stop = Stop(saved["window"][-1][0], saved["monitor"], detector.reason or "")
    except (ValueError, IndexError, KeyError, TypeError):
        return None
    return stop if stop.reason else None


def _dict(value: Any) -> dict[str, Any]:
    """A value of the state that should be a mapping; an empty one if it is anything else."""
    return value if isinstance(value, dict) else {}
