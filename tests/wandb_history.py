"""Reading the history out of the file that an offline W&B run leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from matent_callbacks.report._wandb import _messages


def read_history(folder: Path, *, seconds: float = 60) -> list[dict[str, Any]]:
    """The rows logged by the one offline run below ``folder``, which is finished."""
    rows = [record.history.item for record in _all_records(folder, seconds) if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in rows]


def read_alerts(folder: Path, *, seconds: float = 60) -> list[tuple[str, str]]:
    """Title and text of its alerts."""
    alerts = [record.alert for record in _all_records(folder, seconds) if record.HasField("alert")]
    return [(alert.title, alert.text) for alert in alerts]


def read_charts(folder: Path, *, seconds: float = 60) -> dict[str, tuple[bool, str]]:
    """Whether automatic charts of a name are hidden, and what their x axis is, of names that were defined."""
    defined = [record.metric for record in _all_records(folder, seconds) if record.HasField("metric")]
    return {metric.name: (metric.options.hidden, metric.step_metric) for metric in defined if metric.name}


def _all_records(folder: Path, seconds: float) -> list[Any]:
    (path,) = folder.rglob("*.wandb")
    deadline = time.monotonic() + seconds
    # `wandb.finish` does not wait until all is in the file, and the end of the run is written last.
    while not (records := _records(path)) or records[-1].WhichOneof("record_type") != "exit":
        if time.monotonic() > deadline:
            raise TimeoutError(f"The end of the run was not in {path} within {seconds} s.")
        time.sleep(0.1)
    return records


def _records(path: Path) -> list[Any]:
    return [wandb_internal_pb2.Record.FromString(message) for message in _messages(path.read_bytes())]
