"""Sends pictures and alerts to the reporters of a Trainer, and sets the summary that W&B keeps of a key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import Trainer
from transformers.integrations import (
    CometCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.integrations.integration_utils import rewrite_logs

from matent_callbacks.callbacks import loggers
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.loggers import (
    Pictures,
    Taker,
    to_comet,
    to_each,
    to_mlflow,
    to_run,
    to_tensorboard,
)


def takes_pictures(trainer: Trainer) -> bool:
    """Whether the Trainer reports, from this process, to anything that takes pictures."""
    return bool(_takers(trainer))


def show(trainer: Trainer, pictures: Pictures, guard: Guard) -> None:
    """Send pictures to all reporters of the Trainer that take them, at its current step."""
    if pictures:
        to_each(_takers(trainer), pictures, trainer.state.global_step, guard)


def log_settings(trainer: Trainer, settings: Mapping[str, str], guard: Guard) -> None:
    """Add settings to what W&B and TensorBoard keep of those of the run."""
    writers = (callback.tb_writer for callback in _reporters(trainer, TensorBoardCallback))
    for thing in (*wandb_runs(trainer), *writers):
        with guard(f"the settings of {type(thing).__name__}"):
            loggers.log_settings(thing, settings)


def summarize_by_maximum(trainer: Trainer, guard: Guard, *keys: str) -> bool:
    """Let W&B's table of runs show the maximum of logged keys beside the last value; return whether W&B has a run."""
    runs = wandb_runs(trainer)
    for run in runs:
        with guard("the greatest values in W&B's table of runs"):
            for name in (f"{prefix}/{key}" for key in keys for prefix in ("train", "eval")):
                run.define_metric(name, step_metric="train/global_step", summary="max,last")
    return bool(runs)


def wandb_name(key: str) -> str:
    """Return the name that W&B is sent in place of a logged one."""
    (name,) = rewrite_logs({key: None})
    return str(name)


def alert(trainer: Trainer, guard: Guard, title: str, text: str) -> None:
    """Send an alert to W&B, which forwards it to wherever its user wants."""
    for run in wandb_runs(trainer):
        with guard("the alerts of W&B"):
            run.alert(title, text, level="WARN")


def wandb_runs(trainer: Trainer) -> list[Any]:
    """Find the runs of W&B that the Trainer reports to, from this process."""
    return [run for run in map(_wandb_run, _reporters(trainer, WandbCallback)) if run is not None]


def _wandb_run(callback: Any) -> Any:
    return None if callback._wandb is None else callback._wandb.run


def _to_wandb(callback: Any, pictures: Pictures, step: int) -> None:
    if _wandb_run(callback) is not None:
        _to_log(callback._wandb, pictures, step)


def _to_trackio(callback: Any, pictures: Pictures, step: int) -> None:
    if callback._trackio.context_vars.current_run.get() is not None:
        _to_log(callback._trackio, pictures, step)


def _to_swanlab(callback: Any, pictures: Pictures, step: int) -> None:
    to_run(sys.modules["swanlab"].get_run(), pictures, step)


def _to_log(library: Any, pictures: Pictures, step: int) -> None:
    # These two count the records themselves; the Trainer's step is a value in the record, as it is beside the loss.
    images = {name: library.Image(pixels) for name, pixels in pictures.items()}
    library.log({**images, "train/global_step": step})


def _to_tensorboard(callback: Any, pictures: Pictures, step: int) -> None:
    if callback.tb_writer is not None:
        to_tensorboard(callback.tb_writer, pictures, step)


def _to_mlflow(callback: Any, pictures: Pictures, step: int) -> None:
    run = callback._ml_flow.active_run()
    if run is not None:
        to_mlflow(callback._ml_flow.MlflowClient(), run.info.run_id, pictures, step)


def _to_comet(callback: Any, pictures: Pictures, step: int) -> None:
    if callback._experiment is not None:
        to_comet(callback._experiment, pictures, step)


_CALLS: dict[type, Callable[[Any, Pictures, int], None]] = {
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
    TensorBoardCallback: _to_tensorboard,
    MLflowCallback: _to_mlflow,
    CometCallback: _to_comet,
    SwanLabCallback: _to_swanlab,
}


def _takers(trainer: Trainer) -> list[Taker]:
    calls = dict(_CALLS)
    if "swanlab.integration.transformers" in sys.modules:  # SwanLab's own callback
        calls[sys.modules["swanlab.integration.transformers"].SwanLabCallback] = _to_swanlab
    return [
        (type(callback).__name__, partial(call, callback))
        for kind, call in calls.items()
        for callback in _reporters(trainer, kind)
    ]


def _reporters(trainer: Trainer, kind: type) -> list[Any]:
    # As the reporters do themselves: only from the first process, whatever was opened in the others.
    callbacks = trainer.callback_handler.callbacks if trainer.is_world_process_zero() else []
    return [callback for callback in callbacks if isinstance(callback, kind)]
