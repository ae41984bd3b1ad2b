"""Sections of RESULTS.md, printed as Markdown."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

PLOTS = Path(__file__).parent / "plots"


def begin(title: str, explanation: str | None) -> None:
    """Print the heading of a section, and below it the explanation without its first line."""
    print(f"## {title}\n")
    _, _, rest = inspect.cleandoc(explanation or "").partition("\n\n")
    if rest:
        print(f"{rest}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a cell may hold ``|`` if it stands for several columns."""
    titles = " | ".join(header)
    print(f"| {titles} |")
    print("|---" * (titles.count("|") + 1) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def conditions(*packages: str) -> str:
    """Machine, versions and date in one line."""
    threads = torch.get_num_threads()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *packages))
    return (
        f"{date.today()}, Python {platform.python_version()}, {versions}; {processor()}, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


def processor() -> str:
    """Name of the CPU where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
