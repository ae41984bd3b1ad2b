"""The progress bar of ``matent measure``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from matent_callbacks.cli._state import State
from matent_callbacks.cli._stream import left


def with_bar(
    steps: Iterator[int], title: str, state: State, *, size: int | None, maximum: int | None, ranks: int, shown: bool
) -> Iterator[None]:
    """Run the steps, with a bar on stderr that shows the rate and the time left, if stderr is a terminal.

    Args:
        steps: Yields after each batch how many bytes of text are done.
        title: Label in front of the bar.
        state: The progress that the steps update.
        size: Bytes of the text, if known.
        maximum: Sequences that are asked for, if there is a bound.
        ranks: Number of processes that take such steps at the same time.
        shown: False on the ranks that show nothing.
    """
    begin, before = time.monotonic(), state.sequences
    with _bar(title, shown) as (progress, task):
        for done in steps:
            count = before + (state.sequences - before) * ranks
            rate = (count - before) / max(time.monotonic() - begin, 1e-9)
            shares = [done / size] if size else []
            if maximum is not None:
                shares.append(1 - (left(maximum, count) or 0) / maximum)
            total, completed = (1.0, max(shares)) if shares else (None, 0.0)
            progress.update(task, total=total, completed=completed, rate=f"{rate:,.1f} sequences/s")
            yield


@contextmanager
def _bar(title: str, shown: bool) -> Iterator[tuple[Progress, Any]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disabled = not (shown and console.is_terminal)
    progress = Progress(*columns, console=console, disable=disabled, transient=True)
    # In older releases of rich even a disabled bar ends the line that it did not write.
    with nullcontext() if disabled else progress:
        yield progress, progress.add_task(title, total=None, rate="")
