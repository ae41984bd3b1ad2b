"""The settings of runs, as far as their logs know them, and which of them differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matent_callbacks.report._run import Run

# Key under which a callback keeps the Trainer's settings, in the Trainer's own record of callback states.
SETTINGS = "matent_callbacks.settings"
_LONGEST, _DEEPEST = 80, 4
# Paths and names differ between any two runs, and secrets must not be shown.
_LEFT_OUT = re.compile(
    r"(.*\.)?(output_dir|logging_dir|run_name|hub_model_id|_name_or_path|_wandb|_n_gpu|wandb_version|"
    r".*(_token|password|secret|api_key|credentials?))(\..*)?"
)


def sinks_setting(name: str) -> str:
    """Return the setting that says whether the readings of a name, or those without one, leave attention sinks out."""
    return f"matent_callbacks.exclude_sinks{name and '.'}{name}"


def of_folder(folder: Path) -> dict[str, str]:
    """Read the settings in a folder: those of a model that was saved there, or of a logger of Lightning."""
    return {**flat(_mapping(folder / "config.json")), **flat(_mapping(folder / "hparams.yaml"))}


def first_known(folders: Iterable[Path]) -> dict[str, str]:
    """The settings of the first folder that has any."""
    return next((found for folder in folders if (found := of_folder(folder))), {})


def of_wandb(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The settings in a W&B run: those that were read from its log, or else those of its ``config.yaml``."""
    found = _mapping(file.parent / "files" / "config.yaml")
    kept = {key: entry["value"] for key, entry in found.items() if isinstance(entry, dict) and "value" in entry}
    return flat({**kept, **config})


def from_json(text: str | bytes) -> dict[str, str]:
    """Read the settings in a JSON object; none if the text is anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return flat(found) if isinstance(found, dict) else {}


def flat(settings: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Flatten settings to text by name, with dots for nested ones; without secrets and the run's own names."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if _LEFT_OUT.fullmatch(name):
            continue
        if isinstance(value, Mapping):
            found.update(flat(value, f"{name}.", depth + 1) if depth < _DEEPEST else {})
        elif (text := _text(value)) is not None:
            found[name] = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return found


def differing(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """The settings that at least two runs know and in which they differ, each with the values of all runs."""
    names = sorted({name for run in runs for name in run.settings})
    columns = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in columns.items() if len({v for v in values if v is not None}) > 1}


def _text(value: Any) -> str | None:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return f"{value:.10g}"
    if isinstance(value, str):
        return str.__str__(value)  # of a member of an enumeration its value
    if isinstance(value, list | tuple) and all(isinstance(item, int | float | str | None) for item in value):
        return json.dumps(value)
    return None


def _mapping(file: Path) -> dict[Any, Any]:
    """Read a JSON or YAML file that holds a mapping; empty if it holds anything else or cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            found = yaml.safe_load(text)
    except Exception:  # a missing package, and whatever a damaged or hostile file leads to
        return {}
    return found if isinstance(found, dict) else {}
