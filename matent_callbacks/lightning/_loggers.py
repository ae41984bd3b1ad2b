"""Sends pictures and alerts to Lightning's loggers, and sets the summary that W&B keeps of a key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.image_calls import (
    Pictures,
    Taker,
    to_comet,
    to_each,
    to_mlflow,
    to_tensorboard,
)


def takes_pictures(trainer: Any) -> bool:
    """Whether any logger takes pictures, in this process."""
    return bool(_takers(trainer))


def show(trainer: Any, pictures: Pictures, guard: Guard, *, step: int) -> None:
    """Send pictures to every logger that takes them."""
    if pictures:
        to_each(_takers(trainer), pictures, step, guard)


def summarize_by_maximum(trainer: Any, guard: Guard, *keys: str) -> None:
    """Let W&B's table of runs show the maximum of logged keys beside the last value."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with guard(f"the greatest values in the table of runs of {type(logger).__name__}"):
            experiment = _experiment(logger)
            if hasattr(experiment, "define_metric"):
                for name in (f"{prefix}{key}" for key in keys for prefix in ("", "val_", "test_")):
                    experiment.define_metric(name, step_metric="trainer/global_step", summary="max,last")


def alert(trainer: Any, guard: Guard, title: str, text: str) -> None:
    """Send an alert to W&B, which forwards it to wherever its user wants."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with guard(f"the alerts of {type(logger).__name__}"):
            experiment = _experiment(logger)
            if hasattr(experiment, "alert"):
                experiment.alert(title, text, level="WARN")


def _to_log_image(logger: Any, pictures: Pictures, step: int) -> None:
    for name, pixels in pictures.items():
        logger.log_image(name, [pixels], step=step)


# How to recognise a logger that takes pictures, and its call. The first is W&B's logger and those modelled on it.
_CALLS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Pictures, int], None]], ...] = (
    (lambda logger: hasattr(logger, "log_image"), _to_log_image),
    (
        lambda logger: hasattr(_experiment(logger), "add_image"),
        lambda logger, pictures, step: to_tensorboard(logger.experiment, pictures, step),
    ),
    (
        lambda logger: _is_from("mlflow", _experiment(logger)),
        lambda logger, pictures, step: to_mlflow(logger.experiment, logger.run_id, pictures, step),
    ),
    (
        lambda logger: _is_from("comet_ml", _experiment(logger)),
        lambda logger, pictures, step: to_comet(logger.experiment, pictures, step),
    ),
)


def _takers(trainer: Any) -> list[Taker]:
    found: list[Taker] = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        # A logger whose experiment cannot be opened does not take the numbers either, and is warned about there.
        with contextlib.suppress(Exception):
            call = next((call for applies, call in _CALLS if applies(logger)), None)
            if call is not None:
                found.append((type(logger).__name__, partial(call, logger)))
    return found


def _experiment(logger: Any) -> Any:
    # A user's own logger may not have one.
    return getattr(logger, "experiment", None)


def _is_from(library: str, thing: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == library for kind in type(thing).__mro__)
