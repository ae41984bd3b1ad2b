"""Reads the folder of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from matent_callbacks.report._run import Part, Run, RunError, join, to_record
from matent_callbacks.report._settings import first_known
from matent_callbacks.report._words import step as at

_METRICS = "metrics.csv"


def find(path: Path) -> list[Path]:
    """Find the log in the folder, or those of its versions in order."""
    if path.is_file():
        return [path] * (path.name == _METRICS)
    if (path / _METRICS).is_file():
        return [path / _METRICS]
    logs = [*path.glob(f"version_*/{_METRICS}"), *path.glob(f"*/version_*/{_METRICS}")]
    return sorted(logs, key=lambda p: (p.parent.parent, int(re.sub(r"\D", "", p.parent.name) or 0)))


def read(path: Path, files: list[Path]) -> Run:
    """Read all parts; a CSV log does not tell how the run ended."""
    parts, cut = [], []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"holds a {file.name} that is no text") from error
        # A number that was cut off would still look like a number.
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            cut.append(f"The last line of {file.parent.name}/{file.name} is cut off; it is left out.")
        rows = csv.DictReader(io.StringIO(text))
        if "step" not in (rows.fieldnames or ()):
            raise RunError(f"holds a {file.name} without a column `step`, which Lightning's CSVLogger writes")
        records = [record for row in rows if (record := to_record(row["step"], _filled(row)))]
        parts.append(Part(file.parent.name, records))
    joined, notes = join(parts)
    end = f"The log ends at step {at(joined[-1]['step'])}; a CSV log does not tell whether the run was finished."
    name = path.name if path.is_dir() else path.parent.name
    return Run(
        name, f"Lightning, {_METRICS}", joined, [end, *notes, *cut], None, first_known(f.parent for f in files[::-1])
    )


def _filled(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key and value}
