"""Image-text alignment in PyTorch Lightning."""

from __future__ import annotations

from typing import Any

from matent_callbacks.callbacks.alignment_callback import SharedAlignmentCallback
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.measurement import warn_if_never_due
from matent_callbacks.capture.stack import hugging_face_models
from matent_callbacks.lightning._loggers import summarize_by_maximum
from matent_callbacks.lightning._monitored_steps import MeasuringCallback
from matent_callbacks.lightning._trainer import log, planned_steps


@with_arguments_of(SharedAlignmentCallback)
class AlignmentCallback(SharedAlignmentCallback, MeasuringCallback):
    """Logs how well image and text agree inside a multimodal model while Lightning trains it.

    What is logged, and how it is measured, is described at :class:`matent_callbacks.transformers.AlignmentCallback`;
    here the values of validation and test epochs have the prefixes ``val_`` and ``test_``. The model is the
    transformers model inside the LightningModule, or the LightningModule itself.

    Example:
        >>> from matent_callbacks.lightning import AlignmentCallback
        >>> callback = AlignmentCallback(every_n_steps=20)
        >>> # Trainer(callbacks=[callback]).fit(module_with_a_clip_model, data)
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.join(trainer, trainer.callbacks)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self.off:
            return
        warn_if_never_due(self.every_n_steps, planned_steps(trainer, pl_module), at_end=True)
        with self.guard("the greatest values in W&B's table of runs"):
            summarize_by_maximum(trainer, self.guard, *self.summarized_by_maximum)
        # A probe or a model that cannot be read raises now, not in the middle of the run.
        self._measure(trainer, pl_module)

    def step_values(self, trainer: Any, pl_module: Any, *, due: bool, last: bool) -> dict[str, float] | None:
        return self._measure_or_warn(trainer, pl_module) if due or last else None

    @guarded
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "val")

    @guarded
    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "test")

    def _log_evaluation(self, trainer: Any, pl_module: Any, prefix: str) -> None:
        if self.off or trainer.sanity_checking or not self.during_eval:
            return
        values = {f"{prefix}_{key}": value for key, value in self._measure_or_warn(trainer, pl_module).items()}
        log(pl_module, values, prog_bar=self.prog_bar, add_dataloader_idx=False)

    def _measure_or_warn(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        return self.guard.values("the readings of the probe", lambda: self._measure(trainer, pl_module))

    def _measure(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        return self._alignment.measure(
            _model(pl_module),
            around=lambda: trainer.precision_plugin.forward_context(),
            find_probe=lambda: self._first_pairs(trainer),
        )

    def _first_pairs(self, trainer: Any) -> Any:
        loaders = trainer.val_dataloaders or trainer.test_dataloaders or trainer.train_dataloader
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        return self.first_pairs(loader.dataset, loader.collate_fn)


def _model(pl_module: Any) -> Any:
    """Return the transformers model inside, if there is exactly one, or else the module itself."""
    found = list(hugging_face_models(pl_module).values())
    return found[0] if len(found) == 1 else pl_module
