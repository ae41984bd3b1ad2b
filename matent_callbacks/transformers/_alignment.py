"""Image-text alignment on the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch.distributed as dist
from transformers import Trainer, TrainerState
from transformers.utils import is_datasets_available

from matent_callbacks.alignment.first_pairs import Examples
from matent_callbacks.alignment.measurement import AlignmentMeasurement
from matent_callbacks.alignment.statistics import Stages
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.schedule import check_every_n_steps, warn_if_never_due
from matent_callbacks.transformers._attach import running_evaluation
from matent_callbacks.transformers._measuring import MeasuringCallback
from matent_callbacks.transformers._reporters import summarize_by_maximum


class AlignmentCallback(MeasuringCallback):
    """Logs how well image and text agree inside a multimodal model while a ``Trainer`` trains it.

    For a vision-language model these are the readings of the paper (Wei et al., arXiv 2401.17139; NeurIPS 2024 as
    "Diff-eRank"), on a small probe of image-text pairs, in evaluation mode and without gradient: three forwards of the
    language model (the image alone, the text alone, both) beside those of the vision encoder. For a dual encoder
    (CLIP, SigLIP, any two ``towers``) these are measures of the paired embeddings. Training is bitwise what it is
    without the callback.

    ============================================  ===================================================================
    ``alignment/image_text``                      mean / max of the readings of image, text and both; 1: aligned
    ``alignment/image_reduction_ratio``           share of the image's rank that the connector removes
    ``effective_rank/<stage>``                    ``vision_encoder``, ``connector``, ``image``, ``text``,
                                                  ``image_text``; of a dual encoder ``image_tower``, ``text_tower``
    ``matrix_entropy/<stage>``                    the same in nats, if ``metrics`` has it
    ``alignment/grounding``                       caption loss with the images moved on by one sample minus the loss as
                                                  it is, nats per token; needs ``labels`` in the probe
    ``alignment/image_text_shift``                ``image_text`` on these exchanged pairs minus on the pairs
    ``alignment/mir``                             modality integration rate: how far apart image and text tokens are in
                                                  the layers of the language model; ``alignment/mir/<layer>``: in each
    ``alignment/cka_debiased``                    of the paired vectors: the embeddings of a dual encoder, or the mean
                                                  tokens of ``image`` and ``text``; 0 at chance
    ``alignment/cka_z``, ``mutual_knn_z``         standard deviations above 200 random pairings of them
    ``alignment/cka``, ``mutual_knn``,            of them, with a level at chance that depends on their number and
    ``mutual_information``, ``modality_gap``      width
    ``alignment/skipped_text_only``               samples of the probe without an image, if there are any
    ``alignment/skipped_no_equal``                samples whose images could not be exchanged with any in the batch
    ============================================  ===================================================================

    In evaluation the same values are among the metrics, with the prefix ``eval_`` (or the one given).

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
        >>> from matent_callbacks.transformers import AlignmentCallback, PlateauStopping
        >>> callbacks = [
        ...     AlignmentCallback(every_n_steps=20),
        ...     PlateauStopping("alignment/grounding", min_delta=0.02, patience=6),
        ... ]
        >>> # Trainer(model=vision_language_model, ..., callbacks=callbacks).train()
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
        self._summarized = False
        self._evaluated: Any = None

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        callbacks = trainer.callback_handler.callbacks
        others = [callback._alignment for callback in callbacks if isinstance(callback, AlignmentCallback)]
        self._alignment.set_up(trainer, others, self.guard)

    def check(self) -> None:
        # A probe or a model that cannot be read raises now, not in the middle of the run.
        self._measure()

    def begin(self, state: TrainerState) -> None:
        warn_if_never_due(self.every_n_steps, state.max_steps, at_end=True)

    def was_written(self, logs: Mapping[str, Any]) -> None:
        if not self._summarized:
            self._summarized = summarize_by_maximum(self.trainer, self.guard, *self._alignment.summarized_by_maximum)

    def step_values(self, state: TrainerState) -> dict[str, float]:
        due = state.global_step % self.every_n_steps == 0 or state.global_step == state.max_steps
        return self.guard.values("the readings of the probe", self._measure) if due else {}

    def join_evaluation(self, model: Any, batch: Any) -> None:
        under_way = running_evaluation(self.trainer)
        self._evaluated = None if under_way is None else under_way.get("dataloader")

    def _before_evaluation(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super()._before_evaluation(evaluation_loop, *args, **kwargs)
        self._evaluated = kwargs.get("dataloader", args[0] if args else None)

    def evaluation_values(self) -> dict[str, float]:
        loader, self._evaluated = self._evaluated, None
        # Without a probe each data set is warned about by itself, since there is no value of it.
        own = f"the readings of the first pairs of {self._prefix or 'an evaluation'!r}"
        what = "the readings of the probe" if self._alignment.is_given_a_probe else own
        return self.guard.values(what, lambda: self._measure(lambda: loader, evaluates=True))

    def _measure(self, loader: Callable[[], Any] | None = None, *, evaluates: bool = False) -> dict[str, float]:
        return self._alignment.measure(self.trainer.model, loader=loader or self._examples, evaluates=evaluates)

    def _examples(self) -> Examples:
        """Return the data that readings during training are of, as the Trainer itself loads them."""
        trainer = self.trainer
        evaluates = trainer.eval_dataset is not None
        dataset = trainer.eval_dataset if evaluates else trainer.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        description = "evaluation" if evaluates else "training"
        if is_datasets_available() and isinstance(dataset, importlib.import_module("datasets").Dataset):
            return Examples(trainer._remove_unused_columns(dataset, description), trainer.data_collator)
        return Examples(dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description))
