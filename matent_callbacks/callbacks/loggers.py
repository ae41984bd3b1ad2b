"""Sends numbers and pictures to what runs are logged with: loggers, trackers, writers, functions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from matent_callbacks.callbacks.guard import Guard

if TYPE_CHECKING:
    import numpy as np

Pictures: TypeAlias = "Mapping[str, np.ndarray]"
"""By their names, each of shape ``(height, width, 3)``, uint8."""
Taker: TypeAlias = tuple[str, Callable[[Pictures, int], None]]
"""The name of a logger, and a function that sends it the pictures of a step."""


def to_run(run: Any, pictures: Pictures, step: int) -> None:
    """Send pictures to a run of W&B, Trackio or SwanLab."""
    library = importlib.import_module(type(run).__module__.partition(".")[0])
    run.log({name: library.Image(pixels) for name, pixels in pictures.items()}, step=step)


def to_tensorboard(writer: Any, pictures: Pictures, step: int) -> None:
    """Send pictures to a ``SummaryWriter``, of torch or of tensorboardX."""
    for name, pixels in pictures.items():
        writer.add_image(name, pixels, step, dataformats="HWC")


def to_mlflow(client: Any, run_id: str, pictures: Pictures, step: int) -> None:
    """Send pictures to a run of an ``MlflowClient``; with a step they appear among its charts, not among its files."""
    for name, pixels in pictures.items():
        client.log_image(run_id, pixels, key=name, step=step)


def to_comet(experiment: Any, pictures: Pictures, step: int) -> None:
    """Send pictures to a Comet experiment, online or offline."""
    from PIL import Image

    for name, pixels in pictures.items():
        # Not as an array: Comet would stretch its colours to the whole range, and first try its bytes as a file name.
        experiment.log_image(Image.fromarray(pixels), name=name, step=step)


def _to_log_image(logger: Any, pictures: Pictures, step: int) -> None:
    for name, pixels in pictures.items():
        logger.log_image(name, [pixels], step=step)


def _to_mlflow_logger(logger: Any, pictures: Pictures, step: int) -> None:
    to_mlflow(logger.experiment, logger.run_id, pictures, step)


def takers(loggers: Iterable[Any]) -> list[Taker]:
    """Find those that take pictures, among loggers of Lightning, trackers of accelerate, and runs and writers."""
    found: list[Taker] = []
    for logger in loggers:
        # A logger whose experiment cannot be opened does not take the numbers either, and is warned about there.
        with suppress(Exception):
            send = _call(logger)
            if send is not None:
                found.append((type(logger).__name__, send))
    return found


def _call(logger: Any) -> Callable[[Pictures, int], None] | None:
    thing = experiment(logger)
    if _is_from("comet_ml", thing):
        return partial(to_comet, thing)
    if _is_from("swanlab", thing):
        return partial(to_run, thing)
    if hasattr(logger, "log_image"):  # W&B's logger of Lightning, and those modelled on it
        return partial(_to_log_image, logger)
    if hasattr(thing, "add_image"):
        return partial(to_tensorboard, thing)
    if _is_from("wandb", thing) or _is_from("trackio", thing):
        return partial(to_run, thing)
    return partial(_to_mlflow_logger, logger) if _is_from("mlflow", thing) and hasattr(logger, "run_id") else None


def experiment(logger: Any) -> Any:
    """Return what a logger of Lightning or a tracker of accelerate logs to; or itself, if it is such a thing."""
    # A user's own logger may have neither.
    return getattr(logger, "experiment", getattr(logger, "tracker", logger))


def _is_from(library: str, thing: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == library for kind in type(thing).__mro__)


def log_settings(thing: Any, settings: Mapping[str, str]) -> None:
    """Add settings to those that a run of W&B, a ``SummaryWriter`` or a ``CSVLogger`` keeps; others keep none."""
    thing = experiment(thing)
    if hasattr(thing, "add_text"):
        thing.add_text("matent_callbacks", json.dumps(dict(settings)))
    elif hasattr(thing, "define_metric"):
        thing.config.update(dict(settings), allow_val_change=True)
    elif hasattr(thing, "log_hparams"):
        thing.log_hparams(dict(settings))


def wandb_runs(loggers: Iterable[Any]) -> list[Any]:
    """Find the runs of W&B behind loggers of Lightning, trackers of accelerate, and runs themselves."""
    found = []
    for logger in loggers:
        # As for pictures.
        with suppress(Exception):
            if _is_from("wandb", run := experiment(logger)):
                found.append(run)
    return found


def to_each(takers: Iterable[Taker], pictures: Pictures, step: int, guard: Guard) -> None:
    """Send pictures to each logger, also to those after one that fails."""
    for name, take in takers:
        with guard(f"{name}'s pictures", f"{name} did not take the pictures: {{error}}. Training goes on."):
            take(pictures, step)
