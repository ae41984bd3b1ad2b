"""The run that a report is made from: one record per step, and notes on how complete the log is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from matent_callbacks.accumulate.catalogue import measured_settings
from matent_callbacks.plot._style import alarms, change_of, in_order, numbers_as_numbers
from matent_callbacks.report._keys import LOSSES, Quantity, normalise, parse, parse_all
from matent_callbacks.report._words import layers_only
from matent_callbacks.report._words import step as at

Record = dict[str, float]


class RunError(ValueError):
    """A folder that is no run, or a run that cannot be read; the message is one sentence for the user."""


class NoRunError(RunError):
    """A folder in which no log was found."""


class SeveralRunsError(RunError):
    """Logs of one kind that are not of one run."""


class Part(NamedTuple):
    """What one process logged: a resumed run has several."""

    name: str
    records: list[Record]


class Stop(NamedTuple):
    """Where and why ``PlateauStopping`` ended the run."""

    step: int
    monitor: str
    reason: str


class Curve(NamedTuple):
    """Steps and values of one quantity, in the order of the steps."""

    steps: list[float]
    values: list[float]

    def finite(self) -> Curve:
        """Without NaN and infinities."""
        pairs = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Curve([s for s, _ in pairs], [v for _, v in pairs])

    def change(self, metric: str = "") -> float:
        """How far the last finite value is from the first, as the heat map of a metric shows it; 0 if there is none."""
        values = self.finite().values
        return change_of(metric, values[0], values[-1]) if values else 0.0


@dataclass(frozen=True)
class Run:
    """A run that was read by :func:`~matent_callbacks.report.read_run`."""

    name: str
    """The name that the run gave itself, or that of its folder."""
    source: str
    """What was read."""
    records: list[Record]
    """One for each step, in order, with the names of the Hugging Face Trainer's record."""
    notes: list[str] = field(default_factory=list)
    """What the log tells about itself, in sentences: its end, its parts, what is damaged."""
    stop: Stop | None = None
    settings: dict[str, str] = field(default_factory=dict)
    """The settings of the run, as far as its log knows them."""
    path: Path | None = None
    """Where it was read."""
    part: str = ""
    """The name of the callback or probe whose readings are selected; empty: those that were logged without one."""

    @cached_property
    def alarms(self) -> dict[str, list[float]]:
        """The steps at which an alarm of a collapse was raised, by the key that had collapsed."""
        return alarms(self.records)

    @cached_property
    def alarm_steps(self) -> list[float]:
        """The steps at which any alarm of a collapse was raised."""
        return sorted({step for steps in self.alarms.values() for step in steps})

    @cached_property
    def all_keys(self) -> dict[Quantity, str]:
        """The name in the records of each quantity that is known here."""
        names = self.columns.keys()
        loss = next((name for name in LOSSES if name in names), None)
        return {**parse_all(names), **({Quantity("loss"): loss} if loss else {})}

    @cached_property
    def keys(self) -> dict[Quantity, str]:
        """The same for the selected ``part`` of the run, whose name is left out."""
        return {q._replace(name=""): key for q, key in self.all_keys.items() if q.name == self.part}

    @cached_property
    def names(self) -> list[str]:
        """The names of callbacks and probes that readings were logged under."""
        return sorted({quantity.name for quantity in self.all_keys} - {""}, key=numbers_as_numbers)

    def named(self, name: str) -> Run:
        """Return the same run with the readings under a name selected."""
        part = replace(self, part=name)
        # Shared, so that a long log is not read again for each name.
        vars(part).update(columns=self.columns, all_keys=self.all_keys)
        return part

    @property
    def ids(self) -> str:
        """Prefix of the ids of this part's pictures, which distinguishes them from other parts' in one page."""
        return f"named-{self.names.index(self.part)}-" if self.part else ""

    @cached_property
    def steps(self) -> list[float]:
        """All steps that have a record."""
        return [record["step"] for record in self.records]

    @property
    def measured(self) -> str:
        """What the layers of this part were measured on, ``a probe`` or ``training batches``; empty: not logged."""
        (setting,) = measured_settings({self.part: ""})
        return self.settings.get(setting, "")

    def curve(self, quantity: Quantity) -> Curve:
        """All readings of a quantity; empty where there is none."""
        return self.columns[self.keys[quantity]] if quantity in self.keys else Curve([], [])

    @cached_property
    def columns(self) -> dict[str, Curve]:
        """All readings by their name."""
        # In one go: `series` looks through all records for each name, and there are hundreds of names.
        columns: dict[str, Curve] = {}
        for record in self.records:
            for key in record.keys() - {"step"}:
                steps, values = columns.setdefault(key, Curve([], []))
                steps.append(record["step"])
                values.append(record[key])
        return columns

    def places(self, metric: str, held_out: str | None = None) -> list[str]:
        """The layers or stages that a metric was logged for."""
        return in_order({q.place for q in self.keys if q.metric == metric and q.held_out == held_out})

    def layers(self, metric: str, held_out: str | None = None) -> list[str]:
        """The layers that have a finite reading of a metric."""
        layers = layers_only(self.places(metric, held_out))
        return [layer for layer in layers if self.curve(Quantity(metric, layer, held_out)).finite().values]

    def shown(self, metric: str) -> tuple[str | None, list[str]]:
        """The data that a metric of layers is shown for, training before held-out data, and its layers there."""
        found = ((source, layers) for source in self.sources(metric) if (layers := self.layers(metric, source)))
        return next(found, (None, []))

    def curves(self, metric: str, places: Iterable[str], held_out: str | None = None) -> dict[str, Curve]:
        """The readings of a metric in several places."""
        return {place: self.curve(Quantity(metric, place, held_out)) for place in places}

    def sources(self, metric: str, place: str | None = None) -> list[str | None]:
        """The data that a metric was logged for, there or anywhere, training first."""
        found = {q.held_out for q in self.keys if q.metric == metric and place in (None, q.place)}
        return sorted(found, key=lambda name: (name is not None, name or ""))

    def held_out_sets(self, metric: str, place: str = "") -> list[str]:
        """The held-out data that a metric was logged for."""
        return [source for source in self.sources(metric, place) if source is not None]


def to_record(step: Any, values: Mapping[str, Any]) -> Record | None:
    """Collect the numbers among what was logged at a step; None if the step itself is no finite number."""
    number_of = _number(step)
    if number_of is None or not math.isfinite(number_of):
        return None
    record = {"step": int(number_of) if number_of.is_integer() else number_of}
    for key, value in values.items():
        name, number = normalise(key), _number(value)
        if name not in (None, "step") and number is not None:
            record[str(name)] = number
    return record


def join(parts: Iterable[Part]) -> tuple[list[Record], list[str]]:
    """Merge the parts of a log into one record per step, and collect notes for the reader.

    Where a run was resumed from before its end, the later part counts from its first step of training on. A part that
    only evaluates is no resumption: its values stand beside those of the same steps.

    Raises:
        RunError: If there is nothing in them, or a later part does not go on from an earlier one.
    """
    parts = [part for part in parts if any(len(record) > 1 for record in part.records)]
    if not parts:
        raise RunError("holds a log without a single number in it")
    merged: dict[float, Record] = {}
    notes = []
    for i, part in enumerate(parts):
        first, last = (end(record["step"] for record in part.records) for end in (min, max))
        if i:
            earlier, later = _steps(merged.values()), _steps(part.records)
            before, now = _trained(earlier), _trained(later)
            if not (before or now):
                # Of evaluations alone, those that are repeated tell.
                before, now = ({key: one[key] for key in earlier.keys() & later} for one in (earlier, later))
            shared = before.keys() & now.keys()
            begin, end_before = (end(itertools.chain(*before.values()), default=math.inf) for end in (min, max))
            begins = min(itertools.chain(*now.values()), default=math.inf)
            if begins <= begin < math.inf:
                raise SeveralRunsError("logs that do not continue one another")
            steps = f"{part.name}, with step{f's {at(first)} to' * (first < last)} {at(last)}."
            if not shared:
                notes.append(f"The log has another part, {steps} Its values stand beside those of the same steps.")
            # One reading at the very end is no step that was run twice: an evaluation may log names of training, too.
            elif begins < end_before or begins == end_before < last:
                notes.append(
                    f"The run was resumed: its log has another part, {steps} Steps {at(begins)} to {at(end_before)} "
                    "were run twice: the later part counts."
                )
                merged = {step: record for step, record in merged.items() if step < begins}
            else:
                notes.append(f"The run was resumed: its log has another part, {steps}")
                if first > max(merged):
                    notes.append(
                        f"Between steps {at(max(merged))} and {at(first)} nothing is logged, where the run was resumed."
                    )
        twice: set[float] = set()
        for record in part.records:
            into = merged.setdefault(record["step"], {})
            if any(key in into for key in record if parse(key)):
                twice.add(record["step"])
            into.update(record)
        if twice:
            notes.append(
                f"{_count(len(twice), 'step')} between {at(min(twice))} and {at(max(twice))} "
                f"{'is' if len(twice) == 1 else 'are'} logged more than once in {part.name}: the last record counts."
            )
    return [merged[step] for step in sorted(merged)], notes


def _steps(records: Iterable[Record]) -> dict[str, list[float]]:
    """The steps at which each name was logged, without names that say nothing of whether it trains."""
    found: dict[str, list[float]] = {}
    for record in records:
        for key in record.keys() - {"step", "epoch", "hp_metric"}:
            found.setdefault(key, []).append(record["step"])
    return found


def _trained(steps: Mapping[str, list[float]]) -> Mapping[str, list[float]]:
    """Of names and steps those of training: the quantities that are known, or else whatever names no evaluation."""
    found = {key: at for key, at in steps.items() if not key.startswith(("eval_", "test_", "test/"))}
    known = {key: at for key, at in found.items() if (quantity := parse(key)) and quantity.metric != "plateau"}
    return known or found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _number(value: Any) -> float | None:
    """Convert a logged value to a float; JSON, CSV and W&B each have their own way to write NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
