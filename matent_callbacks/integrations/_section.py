"""Reads the ``matent:`` section of a YAML file, and makes the callbacks that it asks for."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks import __version__
from matent_callbacks.transformers import (
    AlignmentCallback,
    CollapseAlarm,
    MatrixEntropyCallback,
    PlateauStopping,
    ReadingPrinter,
)
from matent_callbacks.transformers._attach import trainer_of

NAME = "matent"
_KINDS: dict[str, type] = {
    "alignment": AlignmentCallback,
    "plateau": PlateauStopping,
    "collapse": CollapseAlarm,
    "printer": ReadingPrinter,
}
# What only Python can give.
_OBJECTS = ("mask", "stages", "process_group", "context_group")
_BATCH_SIZE, _MOST_TOKENS = 8, 512


class _Asked(NamedTuple):
    """One callback, with its settings as they were written."""

    kind: type
    settings: dict[str, Any]
    where: str

    def make(self, tokenize: Callable[[Any], Any]) -> TrainerCallback:
        given = dict(self.settings)
        if "probe" in given:
            given["probe"] = tokenize(given["probe"])
        if isinstance(given.get("dtype"), str):
            given["dtype"] = {"float32": torch.float32, "float64": torch.float64}.get(given["dtype"], given["dtype"])
        if isinstance(given.get("towers"), list):
            given["towers"] = tuple(given["towers"])
        try:
            made: TrainerCallback = self.kind(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"In `{self.where}`: {error}") from error
        return made

    def __str__(self) -> str:
        return f"{self.kind.__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


class Section:
    """What a ``matent:`` section asks for.

    Args:
        settings: The section; ``None``: it is empty.

    Raises:
        ValueError: For a setting that is unknown (with near names), missing, or out of range, and for a file of texts
            that does not exist.

    Example:
        >>> from matent_callbacks.integrations._section import Section
        >>> Section({"every_n_step": 50})
        Traceback (most recent call last):
            ...
        ValueError: `matent` has no setting 'every_n_step': did you mean 'every_n_steps'?
    """

    def __init__(self, settings: Any) -> None:
        settings = _mapping(settings, NAME)
        self.settings = {key: {} if value is None and key in _KINDS else value for key, value in settings.items()}
        flat = {name: value for name, value in settings.items() if name not in _KINDS}
        self._asked = [_asked(MatrixEntropyCallback, flat, NAME, others=_KINDS)]
        for name, kind in _KINDS.items():
            if name in settings:
                several = settings[name] if isinstance(settings[name], list) else [settings[name]]
                where = f"{NAME}: {name}"
                self._asked += [_asked(kind, _mapping(one, where), where) for one in several]
        # The tokenizer and the model are not known yet; everything else is checked now.
        for asked in self._asked:
            asked.make(_check_texts)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Section:
        """Read the section of a whole file; ValueError if it has none."""
        if NAME in config:
            return cls(config[NAME])
        near = difflib.get_close_matches(NAME, map(str, config))
        found = f" Is {_listed(near)} meant to be it?" if near else ""
        raise ValueError(f"There is no `{NAME}:` section, such as `{NAME}: {{every_n_steps: 50, layers: all}}`.{found}")

    def callbacks(self, processing_class: Any) -> list[TrainerCallback]:
        """Make the callbacks, with the tokenizer or the processor that the Trainer has."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return [asked.make(lambda probe: _batches(probe, tokenizer)) for asked in self._asked]

    def announce(self) -> None:
        """Print one line from the first process: frameworks only log that an import has failed."""
        if os.environ.get("RANK", "0") == "0":
            print(f"matent_callbacks {__version__}: {', '.join(map(str, self._asked))}", flush=True)


class AddedCallbacks(TrainerCallback):
    """Adds the callbacks of a section to its Trainer once that is made, since their probe needs its tokenizer."""

    def __init__(self, section: Section) -> None:
        self._section = section

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        # Behind this one: the Trainer is going through the list, and comes to them next.
        trainer = trainer_of(self)
        assert trainer is not None
        trainer.callback_handler.callbacks.extend(self._section.callbacks(processing_class))


def _asked(kind: type, settings: Mapping[str, Any], where: str, others: Iterable[str] = ()) -> _Asked:
    """Check the names of settings, and that none is missing; turn numbers that YAML takes for text into numbers."""
    parameters = inspect.signature(kind).parameters
    # Pairs of images and text are no texts.
    objects = (*_OBJECTS, "probe") if kind is AlignmentCallback else _OBJECTS
    known = [name for name in parameters if name not in objects]
    for name in settings:
        if name in objects:
            raise ValueError(f"`{where}: {name}` can only be given in Python.")
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known, *others])
            meant = f"did you mean {_listed(near)}?" if near else f"it has {', '.join([*known, *others])}."
            raise ValueError(f"`{where}` has no setting {name!r}: {meant}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in settings]
    if missing:
        raise ValueError(f"`{where}` needs {' and '.join(f'`{name}`' for name in missing)}.")
    converted = {}
    for name, value in settings.items():
        expected = parameters[name]
        if isinstance(expected.default, bool) and not isinstance(value, bool):
            raise ValueError(f"`{where}: {name}` must be true or false, got {value!r}.")
        converted[name] = _number(value, str(expected.annotation))
    if not isinstance(converted.get("reference", ""), str | None):
        raise ValueError(f"`{where}: reference` can only be 'start' here, got {converted['reference']!r}.")
    return _Asked(kind, converted, where)


def _number(value: Any, annotation: str) -> Any:
    """Convert ``1e-3``, which is a text to PyYAML, where a number is expected."""
    if isinstance(value, str) and ("float" in annotation or "int" in annotation):
        with suppress(ValueError):
            number = float(value)
            return int(number) if "float" not in annotation and number.is_integer() else number
    return value


def _mapping(settings: Any, where: str) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"`{where}` must hold settings, such as `every_n_steps: 50`, got {settings!r}.")
    return dict(settings)


def _listed(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


def _texts(probe: Any) -> list[str]:
    if isinstance(probe, str):
        if not Path(probe).is_file():
            raise ValueError(f"`matent: probe` is the file {probe!r}, which does not exist.")
        probe = [line for line in Path(probe).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not isinstance(probe, list) or not probe or not all(isinstance(text, str) and text for text in probe):
        raise ValueError(
            "`matent: probe` must be a text file with one text a line, a list of texts, or a mapping of names to "
            f"these, got {probe!r}."
        )
    return probe


def _check_texts(probe: Any) -> Any:
    """Return a probe that stands for one of these texts."""
    for texts in probe.values() if isinstance(probe, Mapping) else [probe]:
        _texts(texts)
    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    return dict.fromkeys(probe, batch) if isinstance(probe, Mapping) else batch


def _batches(probe: Any, tokenizer: Any) -> Any:
    if isinstance(probe, Mapping):
        return {name: _batches(texts, tokenizer) for name, texts in probe.items()}
    if not callable(tokenizer):
        raise ValueError("`matent: probe` needs a tokenizer, and the Trainer has none.")
    texts = _texts(probe)
    size = 1 if getattr(tokenizer, "pad_token", None) is None else _BATCH_SIZE
    encoded = [
        tokenizer(
            texts[start : start + size],
            padding=size > 1,
            truncation=True,
            max_length=_MOST_TOKENS,
            return_tensors="pt",
        )
        for start in range(0, len(texts), size)
    ]
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in encoded]
