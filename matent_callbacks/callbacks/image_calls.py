"""Sends pictures to the libraries that runs are logged with, each by its own call for images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from matent_callbacks.callbacks.guard import Guard

if TYPE_CHECKING:
    import numpy as np

# By their names, each of shape (height, width, 3), uint8.
Pictures: TypeAlias = "Mapping[str, np.ndarray]"
# The name of a logger, and a function that sends it the pictures of a step.
Taker: TypeAlias = tuple[str, Callable[[Pictures, int], None]]


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


def to_each(takers: Iterable[Taker], pictures: Pictures, step: int, guard: Guard) -> None:
    """Send pictures to each logger, also to those after one that fails."""
    for name, take in takers:
        with guard(f"{name}'s pictures", f"{name} did not take the pictures: {{error}}. Training goes on."):
            take(pictures, step)
