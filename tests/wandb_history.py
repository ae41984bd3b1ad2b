"""Reading the history out of the file that an offline W&B run leaves."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32 * 1024, 7, 7


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows logged by the one offline run below ``folder``."""
    (path,) = folder.rglob("*.wandb")
    rows = []
    for message in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB; a record that does not fit is cut into first, middle and last parts."""
    position, parts = _FILE_HEADER, []
    while position + _RECORD_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _RECORD_HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _RECORD_HEADER
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
