"""Pictures, and how W&B sums up a curve, for the reporters of a Trainer that know such things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback

if TYPE_CHECKING:
    import numpy as np


def takes_pictures(trainer: Trainer) -> bool:
    """Whether the Trainer reports to anything that does, from this process."""
    return wandb_run(trainer) is not None or bool(_tensorboard_writers(trainer))


def show(trainer: Trainer, pictures: Mapping[str, np.ndarray]) -> None:
    """Hand pictures to W&B and TensorBoard, where the Trainer reports to them, at the step that it is at."""
    step = trainer.state.global_step
    run = wandb_run(trainer)
    if run is not None and pictures:
        import wandb

        images = {name: wandb.Image(pixels) for name, pixels in pictures.items()}
        run.log({**images, "train/global_step": step})
    for writer in _tensorboard_writers(trainer):
        for name, pixels in pictures.items():
            writer.add_image(name, pixels, step, dataformats="HWC")


def wandb_run(trainer: Trainer) -> Any:
    """The W&B run that the Trainer reports to from this process, or None."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback) and callback._wandb is not None:
            return callback._wandb.run
    return None


def summarize_by_maximum(trainer: Trainer, *keys: str) -> bool:
    """Have W&B's table of runs show the greatest value of logged keys beside the last; whether there is a W&B run."""
    run = wandb_run(trainer)
    if run is None:
        return False
    for name in (f"{prefix}/{key}" for key in keys for prefix in ("train", "eval")):
        run.define_metric(name, step_metric="train/global_step", summary="max,last")
    return True


def _tensorboard_writers(trainer: Trainer) -> list[Any]:
    callbacks = trainer.callback_handler.callbacks
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    return [writer for writer in writers if writer is not None]
