"""Sends pictures and alerts to Lightning's loggers, and sets the summary that W&B keeps of a key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.loggers import Pictures, experiment, takers, to_each


def takes_pictures(trainer: Any) -> bool:
    """Whether any logger takes pictures, in this process."""
    return bool(takers(_loggers(trainer)))


def show(trainer: Any, pictures: Pictures, guard: Guard, *, step: int) -> None:
    """Send pictures to every logger that takes them."""
    if pictures:
        to_each(takers(_loggers(trainer)), pictures, step, guard)


def summarize_by_maximum(trainer: Any, guard: Guard, *keys: str) -> None:
    """Let W&B's table of runs show the maximum of logged keys beside the last value."""
    for logger in _loggers(trainer):
        with guard(f"the greatest values in the table of runs of {type(logger).__name__}"):
            run = experiment(logger)
            if hasattr(run, "define_metric"):
                for name in (f"{prefix}{key}" for key in keys for prefix in ("", "val_", "test_")):
                    run.define_metric(name, step_metric="trainer/global_step", summary="max,last")


def alert(trainer: Any, guard: Guard, title: str, text: str) -> None:
    """Send an alert to W&B, which forwards it to wherever its user wants."""
    for logger in _loggers(trainer):
        with guard(f"the alerts of {type(logger).__name__}"):
            run = experiment(logger)
            if hasattr(run, "alert"):
                run.alert(title, text, level="WARN")


def _loggers(trainer: Any) -> Iterable[Any]:
    return trainer.loggers if trainer.is_global_zero else ()
