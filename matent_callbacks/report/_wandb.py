"""Reads the local folder of a W&B run, without contacting W&B."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matent_callbacks.report._run import Part, Record, Run, RunError, SeveralRunsError, join, to_record
from matent_callbacks.report._settings import of_wandb
from matent_callbacks.report._words import step as at

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32 * 1024, 7, 7
# The Trainer's own count of steps, where one was logged beside W&B's count of records.
_STEPS = ("train/global_step", "trainer/global_step", "_step")


def find(path: Path) -> list[Path]:
    """Find the run in the folder and those in its subfolders, sorted by name and so by time."""
    if path.is_file():
        return [path] * (path.suffix == ".wandb")
    patterns = (
        "*.wandb",
        "offline-run-*/*.wandb",
        "run-*/*.wandb",
        "wandb/offline-run-*/*.wandb",
        "wandb/run-*/*.wandb",
    )
    files = [file for pattern in patterns for file in path.glob(pattern)]
    return sorted(files, key=lambda p: (p.parent.name.removeprefix("offline-"), p))


def read(path: Path, files: list[Path]) -> Run:
    """Read all parts of one run."""
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise RunError("is a W&B run, which needs W&B to be read: pip install wandb") from error
    identities = {file.stem for file in files}
    if len(identities) > 1:
        raise SeveralRunsError("W&B runs")
    parts: list[Part] = []
    name, end = files[0].stem, None
    config: dict[str, Any] = {}
    for file in files:
        records: list[Record] = []
        end = None
        for message in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(message)
            except Exception:  # protobuf's DecodeError, which is in different modules in different versions
                break
            kind = record.WhichOneof("record_type")
            if kind == "history":
                # Items with nested keys, such as pictures, are left out.
                items = [item for item in record.history.item if len(item.nested_key) < 2]
                row = {item.key or item.nested_key[0]: _value(item.value_json) for item in items}
                step = next((row[key] for key in _STEPS if key in row), None)
                found = to_record(step, {k: v for k, v in row.items() if k not in _STEPS and k[:1] != "_"})
                records += [found] if found and len(found) > 1 else []
            elif kind == "run":
                name = record.run.display_name or name
                config.update({i.key: _value(i.value_json) for i in record.run.config.update})
            elif kind == "config":
                config.update({i.key: _value(i.value_json) for i in record.config.update})
            elif kind == "exit":
                end = record.exit.exit_code
        parts.append(Part(file.parent.name, records))
    joined, notes = join(parts)
    last, planned = at(joined[-1]["step"]), config.get("max_steps")
    of = f" of {at(planned)}" if isinstance(planned, int) and planned > 0 else ""
    endings = {
        None: f"The log ends at step {last}{of} without an end mark: the run was cut off, or is still running.",
        0: f"The log ends at step {last}{of}, and the program went on to its end.",
    }
    failed = f"The log ends at step {last}{of}, where the program failed with exit code {end}."
    return Run(
        name,
        "Weights & Biases run folder",
        joined,
        [endings.get(end, failed), *notes],
        None,
        of_wandb(files[-1], config),
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _messages(data: bytes) -> Iterator[bytes]:
    """Read LevelDB's log format: 32 KiB blocks; a record that does not fit is cut into first, middle and last parts."""
    position, parts = _FILE_HEADER, list[bytes]()
    while position + _RECORD_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _RECORD_HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _RECORD_HEADER
        # The rest was never written.
        if kind not in (1, 2, 3, 4) or position + length > len(data):
            return
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
