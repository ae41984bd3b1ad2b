"""The results file of ``--out``: finished models, and the progress of unfinished ones."""

from __future__ import annotations

import base64
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matent_callbacks._files import write_atomically
from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.cli._state import Pooled, State

FORMAT, VERSION = "matent-measure", 1
# Settings that results of earlier releases lack, as they were then.
_BEFORE = {"include_sinks": True}


class ResultsError(ValueError):
    """The results file cannot be continued; the message is one sentence."""


class Results:
    """Finished models, and those in progress."""

    def __init__(self, settings: dict[str, Any], out: Path | None) -> None:
        self.settings = settings
        self.models: list[dict[str, Any]] = []
        self.baseline: dict[str, Any] | None = None
        """What is kept of the baseline to compare other models with it."""
        self._out = out.resolve() if out else None
        self._progress: dict[str, dict[str, Any]] = {}
        if self._out is not None and self._out.exists():
            self._read(self._out)

    def finished(self, model: str) -> bool:
        """Whether a model has been measured already."""
        return any(entry["model"] == model for entry in self.models)

    def states(self, model: str) -> dict[str, State]:
        """The saved progress of a model's passes."""
        return {name: _decode(state) for name, state in self._progress.get(model, {}).items()}

    def finish(self, entry: dict[str, Any]) -> None:
        """Add a finished model."""
        self._progress.pop(entry["model"], None)
        self.models.append(entry)

    def save(self, model: str | None = None, states: dict[str, State] | None = None) -> None:
        """Write the file, with the progress of a model that is being measured.

        Raises:
            OSError: If it cannot be written; the old file is still there then.
        """
        if model is not None and states:
            self._progress[model] = {name: _encode(state) for name, state in states.items()}
        if self._out is None:
            return
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "models": self.models,
        }
        if self.baseline is not None:
            content["_baseline"] = self.baseline
        if self._progress:
            content["_in_progress"] = self._progress
        write_atomically(self._out, json.dumps(content, indent=1, allow_nan=False).encode())

    def _read(self, out: Path) -> None:
        try:
            content = json.loads(out.read_text(encoding="utf-8"))
            ours = content["format"] == FORMAT
        except (OSError, ValueError, LookupError, TypeError):
            ours = False
        if not ours:
            raise ResultsError(f"--out is {out}, which is there and was not written by `matent measure`.")
        if content.get("version") != VERSION:
            raise ResultsError(f"--out has version {content.get('version')} of the format, this is version {VERSION}.")
        before = _BEFORE | content.get("settings", {})
        other = [
            f"--{name.replace('_', '-')} was {before.get(name)!r} and is {value!r}"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if other:
            raise ResultsError(f"--out holds results of other settings ({'; '.join(other)}): give another --out.")
        self.models, self._progress = content["models"], content.get("_in_progress", {})
        self.baseline = content.get("_baseline")
        if any("pooled" not in state for states in self._progress.values() for state in states.values()):
            raise ResultsError("--out holds an unfinished measurement of an earlier release: give another --out.")


def _encode(state: State) -> dict[str, Any]:
    plain = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in ("means", "pooled")}
    pooled = {
        group: {
            field: {layer: {source: _tensors(own) for source, own in of.items()} for layer, of in layers.items()}
            for field, layers in kept._asdict().items()
        }
        for group, kept in state.pooled.items()
    }
    return {**plain, "means": {layer: encoded(sums) for layer, sums in state.means.items()}, "pooled": pooled}


def _decode(content: dict[str, Any]) -> State:
    means = {layer: decoded(sums) for layer, sums in content["means"].items()}
    pooled = {
        int(group): Pooled(*(_layers(kept[field], kind) for field, kind in _KINDS.items()))
        for group, kept in content["pooled"].items()
    }
    return State(**{**content, "means": means, "pooled": pooled})


_KINDS: dict[str, Any] = {"moments": Moments, "means": SequenceMean}


def _layers(content: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {
        layer: {source: kind(**_from_arrays(own)) for source, own in sources.items()}
        for layer, sources in content.items()
    }


def _tensors(own: Moments | SequenceMean) -> dict[str, Any]:
    return {name: encoded(tensor.cpu().numpy()) for name, tensor in own._asdict().items()}


def _from_arrays(own: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(decoded(values)) for name, values in own.items()}


def encoded(values: NDArray[Any]) -> dict[str, Any]:
    """Turn an array into JSON, as bytes, so that a resumed run does not differ by rounding."""
    data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
    return {"dtype": values.dtype.str, "shape": list(values.shape), "data": data}


def decoded(content: dict[str, Any]) -> NDArray[Any]:
    """Return what :func:`encoded` was given."""
    data = np.frombuffer(base64.b64decode(content["data"]), dtype=np.dtype(content["dtype"]))
    return data.reshape(content["shape"]).copy()
