"""Reading the history out of the file that an offline W&B run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from matent_callbacks.report._wandb import _messages


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows logged by the one offline run below ``folder``."""
    (path,) = folder.rglob("*.wandb")
    rows = []
    for message in _messages(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows
