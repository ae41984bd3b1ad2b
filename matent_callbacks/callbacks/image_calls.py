"""The call for an image of the libraries that runs are logged with, and how several of them are served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from matent_callbacks.callbacks.guard import Guard

if TYPE_CHECKING:
    import numpy as np

# By their names, each of shape (height, width, 3), uint8.
Pictures: TypeAlias = "Mapping[str, np.ndarray]"
# Takes pictures at a step, as the logger that it is named after.
Taker: TypeAlias = tuple[str, Callable[[Pictures, int], None]]


def to_tensorboard(writer: Any, pictures: Pictures, step: int) -> None:
    """To a ``SummaryWriter``, of torch or of tensorboardX."""
    for name, pixels in pictures.items():
        writer.add_image(name, pixels, step, dataformats="HWC")


def to_mlflow(client: Any, run_id: str, pictures: Pictures, step: int) -> None:
    """To a run of an ``MlflowClient``: images with a step stand among the charts of the run, not among its files."""
    for name, pixels in pictures.items():
        client.log_image(run_id, pixels, key=name, step=step)


def to_comet(experiment: Any, pictures: Pictures, step: int) -> None:
    """To a Comet experiment, online or offline."""
    from PIL import Image

    for name, pixels in pictures.items():
        # Of an array Comet stretches the colours to the whole range, and takes its bytes for a file name at first.
        experiment.log_image(Image.fromarray(pixels), name=name, step=step)


def to_each(takers: Iterable[Taker], pictures: Pictures, step: int, guard: Guard) -> None:
    """Hand pictures to loggers one after the other, also to those that come after one that fails."""
    for name, take in takers:
        with guard(f"{name}'s pictures", f"{name} did not take the pictures: {{error}}. Training goes on."):
            take(pictures, step)
