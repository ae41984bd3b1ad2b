"""Image-text alignment in PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from matent_callbacks.callbacks.alignment_measurement import SUMMARIZED_BY_MAXIMUM, AlignmentMeasurement
from matent_callbacks.callbacks.alignment_reading import Stages
from matent_callbacks.callbacks.guard import Guard, unguarded
from matent_callbacks.callbacks.measurement import check_every_n_steps
from matent_callbacks.callbacks.probe import first_batch
from matent_callbacks.capture.stack import hugging_face_models
from matent_callbacks.lightning._loggers import summarize_by_maximum
from matent_callbacks.lightning._monitored_steps import MeasuringCallback
from matent_callbacks.lightning._trainer import log


class AlignmentCallback(MeasuringCallback):
    """Logs how well image and text agree inside a multimodal model while Lightning trains it.

    What is logged, and how it is measured, is told at :class:`matent_callbacks.transformers.AlignmentCallback`; here
    the values of validation and test epochs have ``val_`` and ``test_`` before them. The model is the one of
    transformers inside the LightningModule, or the LightningModule itself.

    Args:
        every_n_steps: Optimizer steps between two readings.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; ``None``: the first
            ``num_pairs`` of the validation data, or of the training data, through the loader's own collator.
        num_pairs: How many pairs ``probe=None`` takes.
        during_eval: Also measure at the end of each validation and test epoch.
        basis: What the two ratios are of: ``"effective_rank"`` (the NeurIPS version) or ``"entropy"`` (the first).
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Of ``cka``, ``cka_debiased``, ``cka_z``, ``mutual_knn``, ``mutual_knn_z``,
            ``mutual_information``, ``modality_gap`` and, of vision-language models, ``grounding`` and
            ``image_text_shift``. ``None``: all of a dual encoder; ``cka_debiased``, ``cka_z``, ``mutual_knn``,
            ``mutual_knn_z``, ``grounding`` and ``image_text_shift`` of a vision-language model, as far as the probe
            has enough pairs and labels. Without the last two there is no second forward.
        stages: For a model whose stages are not found.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Neighbours of ``mutual_knn``.
        alpha: Order of ``mutual_information``.
        prog_bar: Show the values in the progress bar.
        on_error: ``"warn"``: what goes wrong later in a run is said once and training goes on; ``"raise"``.

    Raises:
        ValueError: Here for an argument out of range; when training begins for a probe or a model that cannot be read.

    Example:
        >>> from matent_callbacks.lightning import AlignmentCallback
        >>> callback = AlignmentCallback(every_n_steps=20)
        >>> # Trainer(callbacks=[callback]).fit(module_with_a_clip_model, data)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        probe: Any = None,
        num_pairs: int = 16,
        during_eval: bool = True,
        basis: Literal["effective_rank", "entropy"] = "effective_rank",
        metrics: str | Iterable[str] = "effective_rank",
        pair_measures: Iterable[str] | None = None,
        stages: Stages | None = None,
        towers: tuple[str, str] | None = None,
        k: int = 10,
        alpha: float = 1.0,
        prog_bar: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        check_every_n_steps(every_n_steps)
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self._num_pairs = num_pairs
        self._alignment = AlignmentMeasurement(
            probe=probe,
            basis=basis,
            metrics=metrics,
            pair_measures=pair_measures,
            stages=stages,
            towers=towers,
            k=k,
            alpha=alpha,
        )
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._alignment = self._alignment.renewed()

    @property
    def state_key(self) -> str:
        return str(self._generate_state_key(every_n_steps=self.every_n_steps, metrics=self._alignment.metrics))

    @unguarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self.off:
            return
        with self.guard("the greatest values in W&B's table of runs"):
            summarize_by_maximum(trainer, self.guard, *SUMMARIZED_BY_MAXIMUM)
        # A probe or a model that cannot be read is told now, not in the middle of the run.
        self._measure(trainer, pl_module)

    def step_values(self, trainer: Any, pl_module: Any, *, due: bool, last: bool) -> dict[str, float] | None:
        return self._measure_or_warn(trainer, pl_module) if due or last else None

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "val")

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
        return first_batch(loader.dataset, loader.collate_fn, self._num_pairs)


def _model(pl_module: Any) -> Any:
    """The model of transformers inside, if there is one."""
    found = list(hugging_face_models(pl_module).values())
    return found[0] if len(found) == 1 else pl_module
