"""Reads a TensorBoard log folder, of either framework."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matent_callbacks.plot._style import numbers_as_numbers
from matent_callbacks.report._run import Part, Record, Run, RunError, join, to_record
from matent_callbacks.report._settings import first_known, from_json
from matent_callbacks.report._words import step as at

# What the Hugging Face Trainer and the callbacks write beside the numbers.
_SETTINGS = ("model_config/text_summary", "args/text_summary", "matent_callbacks/text_summary")


def find(path: Path) -> list[Path]:
    """Find the event files in the folder, or in its subfolders, sorted by name and so by time."""
    if path.is_file():
        return [path] * ("tfevents" in path.name)

    def by_time(found: Iterable[Path]) -> list[Path]:
        # Within a second the files of a process are numbered, without zeros in front.
        return sorted((p for p in found if p.is_file()), key=lambda p: (numbers_as_numbers(p.name), p.parent))

    return by_time(path.glob("*tfevents*")) or by_time(path.rglob("*tfevents*"))


def read(path: Path, files: list[Path]) -> Run:
    """Read all parts; event files do not tell how the run ended."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    except ImportError as error:
        raise RunError("is a TensorBoard log, which needs TensorBoard to be read: pip install tensorboard") from error
    parts = []
    settings: dict[str, str] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        merged: dict[float, Record] = {}
        tags = events.Tags()
        for tag in tags["tensors"]:
            for event in events.Tensors(tag) if tag in _SETTINGS else ():
                settings.update(from_json(event.tensor_proto.string_val[0]))
        for tag in tags["scalars"]:
            for event in events.Scalars(tag):
                record = to_record(event.step, {tag: event.value})
                if record is not None:
                    merged.setdefault(event.step, {}).update(record)
        name = file.name if path in (file, file.parent) else str(file.parent.relative_to(path))
        parts.append(Part(name, list(merged.values())))
    joined, notes = join(parts)
    end = (
        f"The log ends at step {at(joined[-1]['step'])}; a TensorBoard log does not tell whether the run was finished."
    )
    name = path.name if path.is_dir() else path.parent.name
    settings = {**first_known(file.parent for file in files[::-1]), **settings}
    return Run(name, "TensorBoard event files", joined, [end, *notes], None, settings)
