"""Image-text alignment in PyTorch Lightning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch.distributed as dist

from matent_callbacks.alignment.measurement import AlignmentMeasurement
from matent_callbacks.alignment.statistics import Stages
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.schedule import check_every_n_steps, warn_if_never_due
from matent_callbacks.capture.stack import hugging_face_models
from matent_callbacks.lightning._loaders import evaluated_loader, loader_of_run, num_evaluated
from matent_callbacks.lightning._measuring import MeasuringCallback
from matent_callbacks.lightning._trainer import planned_steps, summarize_by_maximum


class AlignmentCallback(MeasuringCallback):
    """Logs how well image and text agree inside a multimodal model while Lightning trains it.

    What is logged, and how it is measured, is described at :class:`matent_callbacks.transformers.AlignmentCallback`;
    here the values of validation and test epochs have the prefixes ``val_`` and ``test_``, and with several loaders and
    no ``probe`` ``/dataloader_idx_0``, ``/dataloader_idx_1``, ... behind their names. The model is the transformers
    model inside the LightningModule, or the LightningModule itself.

    Args:
        every_n_steps: Optimizer steps between two readings.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them, measured everywhere.
            Or a mapping of several named probes; each name is put before the names of its values. ``None``: the first
            ``num_pairs`` of the data, through the run's own collator: each evaluation measures the data that it
            evaluates, and training those of the first evaluation set, or the training data where there is none.
        num_pairs: How many pairs ``probe=None`` takes.
        during_eval: Also measure at the end of each evaluation.
        basis: What the two ratios are computed from, ``"effective_rank"`` or ``"entropy"``.
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Any of ``cka``, ``cka_debiased``, ``cka_z``, ``mutual_knn``, ``mutual_knn_z``,
            ``mutual_information``, ``modality_gap`` and, of vision-language models, ``grounding``,
            ``image_text_shift``, ``mir`` and ``mir_by_layer``. ``None``: all of a dual encoder; ``cka_debiased``,
            ``cka_z``, ``mutual_knn``, ``mutual_knn_z``, ``grounding`` and ``image_text_shift`` of a vision-language
            model, as far as the probe has enough pairs and labels. Without the last two there is no second forward.
        stages: For a model whose stages are not found: a function from (model, batch) to the five
            :class:`~matent_callbacks.Stage` and the number of samples it left out, or a
            mapping of five functions from (model, batch) to ``(hidden_states, mask)``.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Number of neighbours in ``mutual_knn`` and ``mutual_knn_z``.
        alpha: Order of ``mutual_information``.
        prog_bar: Show the values in the progress bar.
        name: Prefix of the names of all values, ``<name>/alignment/...``: for a second callback.
        process_group: The ranks whose pairs belong together; ``None``: those of the data-parallel dimensions of the
            Trainer's device mesh, or else all.
        context_group: Those of them that hold parts of the same sequences in every forward of the language model
            (Ulysses, ring attention). Each needs the same probe and runs its part of it. ``None``: each runs the whole
            probe. Cannot be combined with ``stages``; towers of a dual encoder always run whole sequences.
        on_error: ``"warn"``: an error later in a run is warned about once, and training goes on; ``"raise"``.

    Raises:
        ValueError: Here for an argument out of range; when training begins for a probe or a model that cannot be read,
            and for a second callback that would log the same names.

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
        name: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        given = locals()
        check_every_n_steps(every_n_steps)
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = self.steps_until_logged = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self.name = name
        self._alignment = AlignmentMeasurement(**measured_arguments(given))
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._alignment = self._alignment.renewed()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = [callback._alignment for callback in trainer.callbacks if isinstance(callback, AlignmentCallback)]
        self._alignment.set_up(trainer, others, self.guard)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self.off:
            return
        warn_if_never_due(self.every_n_steps, planned_steps(trainer, pl_module), at_end=True)
        with self.guard("the greatest values in W&B's table of runs"):
            summarize_by_maximum(trainer, self.guard, *self._alignment.summarized_by_maximum)
        # The callback may have been in another run, on other data.
        self._alignment.forget()
        # Not in the measurement: if a hook of the user's failed there on one rank, that rank would wait for the others.
        loader = None if self._alignment.is_given_a_probe else loader_of_run(trainer)
        # A probe or a model that cannot be read raises now, not in the middle of the run.
        self._measure(trainer, pl_module, lambda: loader)

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
        if self._alignment.is_given_a_probe:
            self.log_evaluation(trainer, pl_module, prefix, self._measure_or_warn(trainer, pl_module))
            return
        for index in range(num_loaders := num_evaluated(trainer)):
            # Each is warned about by itself, since there is no value of it.
            what = f"the readings of the first pairs of {prefix!r} data" + f", loader {index}" * (num_loaders > 1)
            measure = functools.partial(
                self._measure, trainer, pl_module, functools.partial(evaluated_loader, trainer, index), evaluates=True
            )
            values = self.guard.values(what, measure)
            self.log_evaluation(trainer, pl_module, prefix, values, loader=index, loaders=num_loaders)

    def _measure_or_warn(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        return self.guard.values("the readings of the probe", lambda: self._measure(trainer, pl_module))

    def _measure(
        self, trainer: Any, pl_module: Any, loader: Callable[[], Any] = lambda: None, *, evaluates: bool = False
    ) -> dict[str, float]:
        return self._alignment.measure(
            _model(pl_module),
            around=lambda: trainer.precision_plugin.forward_context(),
            loader=loader,
            evaluates=evaluates,
        )


def _model(pl_module: Any) -> Any:
    """Return the transformers model inside, if there is exactly one, or else the module itself."""
    found = list(hugging_face_models(pl_module).values())
    return found[0] if len(found) == 1 else pl_module
