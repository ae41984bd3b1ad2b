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
from matent_callbacks.cli._documents import OTHER_TEXT, Text, TextError
from matent_callbacks.cli._fingerprints import Fingerprint, differ, fingerprint
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
        # By model: its fingerprint, and the checksum of the text that it has read.
        self._origins: dict[str, dict[str, Any]] = {}
        if self._out is not None and self._out.exists():
            self._read(self._out)

    def entry(self, model: str) -> dict[str, Any] | None:
        """The results of a model that has been measured already."""
        return next((entry for entry in self.models if entry["model"] == model), None)

    def states(self, model: str) -> dict[str, State]:
        """The saved progress of a model's passes."""
        return {name: _decode(state) for name, state in self._progress.get(model, {}).items()}

    def check(self, model: str, baseline: str | None) -> tuple[bool, str | None]:
        """Return whether there are results of a model as it is now, and what to say about it.

        Results of a model that has changed are discarded; with those of the baseline all that were compared with it.
        """
        if self.entry(model) is None:
            return False, None
        before = self._origins.get(model)
        if before is None:
            by = "by a release that did not note whether the model or the text has changed since"
            return True, f"{model} is in {self._out} already, {by}."
        if not differ(before["fingerprint"], fingerprint(model, baseline=baseline)):
            return True, f"{model} is in {self._out} already."
        others = self._forget(model)
        also = f", and so is what was compared with it: {', '.join(others)}" if others else ""
        return False, f"{model} has changed since it was measured for {self._out}, and is measured anew{also}."

    def forget_other_texts(self, text: Text) -> str | None:
        """Discard the results on a text that began otherwise than this one; returns what to say about it."""
        read = {model: of["text"] for model, of in self._origins.items() if self.entry(model) and "text" in of}
        # Files that are longer now have another size, which is one of the settings.
        whole = text.size is None and any(of["to_the_end"] for of in read.values())
        found, end = text.checksums((of["bytes"] for of in read.values()), whole=whole)
        others = [
            model
            for model, of in read.items()
            if found.get(of["bytes"]) != of["crc32"] or (whole and of["to_the_end"] and of["bytes"] != end)
        ]
        for model in others:
            self._forget(model)
        if not others:
            return None
        names = ", ".join(others)
        return f"--text is not what it was for {self._out}, whose results are discarded and measured anew: {names}."

    def begin(self, model: str, own: Fingerprint, text: Text) -> str | None:
        """Remember of which model the progress is, and discard that of another one; returns what to say about it.

        Raises:
            TextError: If there is progress on another text.
        """
        before = self._origins.get(model)
        self._origins[model] = {"fingerprint": own}
        said = None
        if model in self._progress and before is None:
            said = f"{model} goes on from an earlier release, which did not note whether the model has changed since."
        elif model in self._progress and before is not None and differ(before["fingerprint"], own):
            del self._progress[model]
            said = f"{model} has changed since its measurement was interrupted, and is measured anew."
        states = self._progress.get(model, {}).values()
        found, _ = text.checksums(state["end"] for state in states)
        if any(found.get(state["end"]) != state["checksum"] for state in states):
            raise TextError(OTHER_TEXT)
        return said

    def _forget(self, model: str) -> list[str]:
        """Discard the results of a model, and those that were compared with it, whose models are returned."""
        compared = [] if self.baseline is None or self.baseline["model"] != model else self.models
        others = [entry["model"] for entry in compared if entry["model"] != model]
        if compared:
            self.baseline = None
        self.models = [entry for entry in self.models if entry["model"] not in (model, *others)]
        return others

    @property
    def has_read(self) -> bool:
        """Whether there are results or progress whose text can be compared with another."""
        return bool(self.models or self._progress)

    def finish(self, entry: dict[str, Any], state: State) -> None:
        """Add a finished model, with where it was in the text in the end."""
        self._progress.pop(entry["model"], None)
        most = self.settings["max_sequences"]
        self._origins[entry["model"]]["text"] = {
            "bytes": state.end,
            "crc32": state.checksum,
            "to_the_end": most is None or state.accepted < most,
        }
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
        # Not in the entries: these are equal for equal models and texts, wherever they are.
        if origins := {m: own for m, own in self._origins.items() if m in self._progress or self.entry(m)}:
            content["_origins"] = origins
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
        self.baseline, self._origins = content.get("_baseline"), content.get("_origins", {})
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
