"""Pictures, and how W&B sums up a curve, for those of Lightning's loggers that know such things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def takes_pictures(trainer: Any) -> bool:
    """Whether any logger does, in this process."""
    return trainer.is_global_zero and any(_takes_pictures(logger) for logger in trainer.loggers)


def show(trainer: Any, pictures: Mapping[str, np.ndarray], *, step: int) -> None:
    """Hand pictures to every logger that takes images: by ``log_image`` as W&B's, or as TensorBoard's."""
    for logger in filter(_takes_pictures, trainer.loggers):
        for name, pixels in pictures.items():
            if hasattr(logger, "log_image"):
                logger.log_image(name, [pixels], step=step)
            else:
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def _takes_pictures(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")


def summarize_by_maximum(trainer: Any, *keys: str) -> None:
    """Have W&B's table of runs show the greatest value of logged keys beside the last one."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "define_metric"):
            for name in (f"{prefix}{key}" for key in keys for prefix in ("", "val_", "test_")):
                logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="max,last")
