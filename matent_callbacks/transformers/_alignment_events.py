"""Image-text alignment on the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.alignment_callback import SharedAlignmentCallback
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.measurement import warn_if_never_due
from matent_callbacks.transformers._log_records import MeasuringCallback
from matent_callbacks.transformers._reporters import summarize_by_maximum


@with_arguments_of(SharedAlignmentCallback)
class AlignmentCallback(SharedAlignmentCallback, MeasuringCallback):
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
    ``alignment/cka_debiased``                    of the paired vectors: the embeddings of a dual encoder, or the mean
                                                  tokens of ``image`` and ``text``; 0 at chance
    ``alignment/cka_z``, ``mutual_knn_z``         standard deviations above 200 random pairings of them
    ``alignment/cka``, ``mutual_knn``,            of them, with a level at chance that depends on their number and
    ``mutual_information``, ``modality_gap``      width
    ``alignment/skipped_text_only``               samples of the probe without an image, if there are any
    ``alignment/skipped_no_equal``                samples whose images could not be exchanged with any in the batch
    ============================================  ===================================================================

    In evaluation the same values are among the metrics, with the prefix ``eval_`` (or the one given).

    Example:
        >>> from matent_callbacks.transformers import AlignmentCallback, PlateauStopping
        >>> callbacks = [
        ...     AlignmentCallback(every_n_steps=20),
        ...     PlateauStopping("alignment/grounding", min_delta=0.02, patience=6),
        ... ]
        >>> # Trainer(model=vision_language_model, ..., callbacks=callbacks).train()
    """

    def start_over(self) -> None:
        super().start_over()
        self._summarized = False

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        self.join(trainer, trainer.callback_handler.callbacks)

    def check(self) -> None:
        # A probe or a model that cannot be read raises now, not in the middle of the run.
        self._measure()

    def begin(self, state: TrainerState) -> None:
        warn_if_never_due(self.every_n_steps, state.max_steps, at_end=True)

    @guarded
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if not self._summarized and logs is not None:
            self._summarized = summarize_by_maximum(self.trainer, self.guard, *self.summarized_by_maximum)

    def is_due(self, state: TrainerState) -> bool:
        return bool(state.global_step % self.every_n_steps == 0 or state.global_step == state.max_steps)

    def step_values(self, state: TrainerState) -> dict[str, float]:
        return self.evaluation_values()

    def evaluation_values(self) -> dict[str, float]:
        return self.guard.values("the readings of the probe", self._measure)

    def _measure(self) -> dict[str, float]:
        return self._alignment.measure(self.trainer.model, find_probe=self._first_pairs)

    def _first_pairs(self) -> Any:
        trainer = self.trainer
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        return self.first_pairs(dataset, trainer.data_collator)
