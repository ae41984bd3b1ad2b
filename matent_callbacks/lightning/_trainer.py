"""What all callbacks need from Lightning: its ``Callback``, and how numbers, pictures and alerts are logged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from matent_callbacks.callbacks import loggers
from matent_callbacks.callbacks.guard import Guard, guarded, without_run
from matent_callbacks.callbacks.loggers import Pictures, experiment, takers, to_each, wandb_runs
from matent_callbacks.callbacks.state_keys import StateKey, refusing

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # Hooks are looked up by name, so a callback of one package runs in the Trainer of the other.
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

__all__ = [
    "GuardedCallback",
    "alert",
    "compiled_whole",
    "draws_its_batches",
    "log",
    "log_settings",
    "log_to_loggers",
    "logging_step",
    "planned_steps",
    "publish",
    "runs_of_wandb",
    "show",
    "summarize_by_maximum",
    "takes_names_with_a_loader",
    "takes_pictures",
]


class GuardedCallback(Callback):
    """A Lightning ``Callback`` whose hooks never end a run, and whose copies have nothing of a run."""

    guard: Guard
    trainer: Any = None

    state_key = StateKey()
    """Identifies this callback's state in the checkpoint."""

    # Events of Hugging Face's Trainer, which has other callbacks.
    on_init_end = on_train_begin = on_prediction_step = refusing("transformers")

    @property
    def callbacks_of_trainer(self) -> list[Any]:
        """The callbacks of the Trainer, once it is known."""
        return [] if self.trainer is None else list(self.trainer.callbacks)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer = trainer

    @guarded
    def state_dict(self) -> dict[str, Any]:
        # Also where there is none, so that Lightning asks each callback for its key when the Trainer is made.
        return {}

    def start_over(self) -> None:
        """Replace everything that comes from a run by new objects, so that only the arguments are left."""

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer gives its callbacks methods of the LightningModule.
        return {name: value for name, value in without_run(self).items() if name not in ("log", "log_dict")}


def draws_its_batches(step: Any) -> bool:
    """Whether a step takes the loader's iterator, ``training_step(self, dataloader_iter)``.

    Hooks are then given the previous batch, or none, and its index.
    """
    return "dataloader_iter" in inspect.signature(step).parameters


def compiled_whole(pl_module: Any) -> bool:
    """Whether ``torch.compile`` was called on the LightningModule itself."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def takes_names_with_a_loader(trainer: Any) -> bool:
    """Whether ``self.log`` takes a name that ends in ``/dataloader_idx_0``: Lightning before 2.5.3 raises."""
    package = type(trainer.fit_loop).__module__.partition(".")[0]
    return Version(version(package)) >= Version("2.5.3")


def log(pl_module: Any, values: dict[str, float], **arguments: Any) -> None:
    """Log by the module's own ``log``."""
    # Without a size Lightning looks for that of the batch, and raises if the step draws its batches itself.
    pl_module.log_dict(values, batch_size=1, **arguments)


def logging_step(trainer: Any) -> int:
    """Return the step that the Trainer itself would now write values of ``self.log`` under."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def planned_steps(trainer: Any, pl_module: Any) -> int | None:
    """Return at how many optimizer steps training ends at the latest, if that is known."""
    planned = [trainer.max_steps] if trainer.max_steps >= 0 else []
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    if pl_module.automatic_optimization and epochs is not None and epochs >= 0 and math.isfinite(per_epoch):
        planned.append(math.ceil(per_epoch / trainer.accumulate_grad_batches) * epochs)
    return min(planned, default=None)


def checkpoint_folder(trainer: Any) -> str | None:
    """Return the folder of the first ``ModelCheckpoint``, or else of the Trainer; ``None`` if it is not on a disk."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folder = str(next(filter(None, folders), trainer.default_root_dir))
    return None if "://" in folder else folder


def log_to_loggers(trainer: Any, values: dict[str, float], guard: Guard, *, step: int | None = None) -> None:
    """Write to every logger at a step, by default the current one, whatever ``log_every_n_steps`` is."""
    for logger in trainer.loggers:
        # Guarded: Lightning itself may not have written at this step, so an error must not end the run here.
        kind = type(logger).__name__
        with guard(kind, f"{kind} did not take the readings: {{error}}. Training goes on."):
            logger.log_metrics(values, step=logging_step(trainer) if step is None else step)
            logger.save()


def publish(trainer: Any, values: dict[str, float], guard: Guard, *, step: int | None = None) -> None:
    """Log from where ``self.log`` cannot be called: to the loggers and to ``callback_metrics``."""
    log_to_loggers(trainer, values, guard, step=step)
    with guard("`trainer.callback_metrics`"):
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def takes_pictures(trainer: Any) -> bool:
    """Whether any logger takes pictures, in this process."""
    return bool(takers(_loggers(trainer)))


def show(trainer: Any, pictures: Pictures, guard: Guard, *, step: int) -> None:
    """Send pictures to every logger that takes them."""
    if pictures:
        to_each(takers(_loggers(trainer)), pictures, step, guard)


def log_settings(trainer: Any, settings: Mapping[str, str], guard: Guard) -> None:
    """Add settings to those that loggers keep of the run."""
    for logger in _loggers(trainer):
        with guard(f"the settings of {type(logger).__name__}"):
            loggers.log_settings(logger, settings)


def summarize_by_maximum(trainer: Any, guard: Guard, *keys: str) -> None:
    """Let W&B's table of runs show the maximum of logged keys beside the last value."""
    for logger in _loggers(trainer):
        with guard(f"the greatest values in the table of runs of {type(logger).__name__}"):
            run = experiment(logger)
            if hasattr(run, "define_metric"):
                for name in (f"{prefix}{key}" for key in keys for prefix in ("", "val_", "test_")):
                    run.define_metric(name, step_metric="trainer/global_step", summary="max,last")


def runs_of_wandb(trainer: Any) -> list[Any]:
    """Find the runs of W&B that this process logs to."""
    return wandb_runs(_loggers(trainer))


def alert(trainer: Any, guard: Guard, title: str, text: str) -> None:
    """Send an alert to W&B, which forwards it to wherever its user wants."""
    for logger in _loggers(trainer):
        with guard(f"the alerts of {type(logger).__name__}"):
            run = experiment(logger)
            if hasattr(run, "alert"):
                run.alert(title, text, level="WARN")


def _loggers(trainer: Any) -> Iterable[Any]:
    return trainer.loggers if trainer.is_global_zero else ()
