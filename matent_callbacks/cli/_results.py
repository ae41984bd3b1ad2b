"""The results file of ``--out``: finished models, and the progress of unfinished ones."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matent_callbacks.accumulate.catalogue import Embedding
from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.cli._bootstrap import LEVEL, REPLICATES, Means
from matent_callbacks.cli._state import State

FORMAT, VERSION = "matent-measure", 1


class ResultsError(ValueError):
    """The results file cannot be continued; the message is one sentence."""


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on."""

    text: str
    text_bytes: int | None
    field: str | None
    layers: list[str | int]
    metrics: list[str]
    embedding: Embedding
    max_length: int
    max_sequences: int | None
    batch_tokens: int
    untrained: bool
    seed: int
    dtype: str
    replicates: int = REPLICATES
    confidence: float = LEVEL


class Results:
    """Finished models, and those in progress."""

    def __init__(self, settings: Settings, out: Path | None) -> None:
        self.settings = settings
        self.models: list[dict[str, Any]] = []
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
        """Write the file atomically: whenever the process ends, it is the old one or the new one.

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
            "settings": asdict(self.settings),
            "models": self.models,
        }
        if self._progress:
            content["_in_progress"] = self._progress
        handle, name = tempfile.mkstemp(prefix=f".{self._out.name}.", dir=self._out.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, self._out)
        except BaseException:
            os.unlink(name)
            raise

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
        before, now = content.get("settings", {}), asdict(self.settings)
        other = [
            f"--{f.name.replace('_', '-')} was {before.get(f.name)!r} and is {now[f.name]!r}"
            for f in fields(self.settings)
            if before.get(f.name) != now[f.name]
        ]
        if other:
            raise ResultsError(f"--out holds results of other settings ({'; '.join(other)}): give another --out.")
        self.models, self._progress = content["models"], content.get("_in_progress", {})


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _encode(state: State) -> dict[str, Any]:
    plain = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in ("means", "moments", "others")}
    means = {
        layer: {name: _array(values) for name, values in own.state().items()} for layer, own in state.means.items()
    }
    moments, others = (
        {layer: {source: _tensors(own) for source, own in sources.items()} for layer, sources in of_layers.items()}
        for of_layers in (state.moments, state.others)
    )
    return {**plain, "means": means, "moments": moments, "others": others}


def _decode(content: dict[str, Any]) -> State:
    means = {
        layer: Means.from_state({name: _values(values) for name, values in own.items()})
        for layer, own in content["means"].items()
    }
    moments = {
        layer: {source: Moments(**_from_arrays(own)) for source, own in sources.items()}
        for layer, sources in content["moments"].items()
    }
    others = {
        layer: {source: SequenceMean(**_from_arrays(own)) for source, own in sources.items()}
        for layer, sources in content["others"].items()
    }
    return State(**{**content, "means": means, "moments": moments, "others": others})


def _tensors(own: Moments | SequenceMean) -> dict[str, Any]:
    return {name: _array(tensor.cpu().numpy()) for name, tensor in own._asdict().items()}


def _from_arrays(own: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(_values(values)) for name, values in own.items()}


def _array(values: NDArray[Any]) -> dict[str, Any]:
    # As bytes, so that a resumed run does not differ by rounding.
    data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
    return {"dtype": values.dtype.str, "shape": list(values.shape), "data": data}


def _values(content: dict[str, Any]) -> NDArray[Any]:
    data = np.frombuffer(base64.b64decode(content["data"]), dtype=np.dtype(content["dtype"]))
    return data.reshape(content["shape"]).copy()
