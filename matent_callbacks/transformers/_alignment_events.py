"""Image-text alignment on the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.alignment_measurement import SUMMARIZED_BY_MAXIMUM, AlignmentMeasurement
from matent_callbacks.callbacks.alignment_reading import Stages
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.measurement import check_every_n_steps
from matent_callbacks.callbacks.probe import first_batch
from matent_callbacks.transformers._log_records import MeasuringCallback
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
    ``alignment/cka_debiased``                    of the paired vectors: the embeddings of a dual encoder, or the mean
                                                  tokens of ``image`` and ``text``; 0 at chance
    ``alignment/cka_z``, ``mutual_knn_z``         standard deviations above 200 random pairings of them
    ``alignment/cka``, ``mutual_knn``,            of them, with a level at chance that depends on their number and
    ``mutual_information``, ``modality_gap``      width
    ``alignment/skipped_text_only``               samples of the probe without an image, if there are any
    ``alignment/skipped_no_equal``                samples whose images no other in the batch could take
    ============================================  ===================================================================

    In evaluation the same stand among the metrics, with ``eval_`` (or the prefix given) before them.

    Args:
        every_n_steps: Optimizer steps between two readings.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; ``None``: the first
            ``num_pairs`` of the evaluation data set, or of the training one, through the Trainer's own collator.
        num_pairs: How many pairs ``probe=None`` takes.
        during_eval: Also measure at the end of each evaluation.
        basis: What the two ratios are of: ``"effective_rank"`` (the NeurIPS version) or ``"entropy"`` (the first).
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Of ``cka``, ``cka_debiased``, ``cka_z``, ``mutual_knn``, ``mutual_knn_z``,
            ``mutual_information``, ``modality_gap`` and, of vision-language models, ``grounding`` and
            ``image_text_shift``. ``None``: all of a dual encoder; ``cka_debiased``, ``cka_z``, ``mutual_knn``,
            ``mutual_knn_z``, ``grounding`` and ``image_text_shift`` of a vision-language model, as far as the probe
            has enough pairs and labels. Without the last two there is no second forward.
        stages: For a model whose stages are not found: a function from (model, batch) to the five
            :class:`~matent_callbacks.capture.vision_language.Stage` and the number of samples it left out, or a
            mapping of five functions from (model, batch) to ``(hidden_states, mask)``.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Neighbours of ``mutual_knn``.
        alpha: Order of ``mutual_information``.
        on_error: ``"warn"``: what goes wrong later in a run is said once and training goes on; ``"raise"``.

    Raises:
        ValueError: Here for an argument out of range; when training begins for a probe or a model that cannot be read.

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
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        check_every_n_steps(every_n_steps)
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
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
        super().__init__(during_eval=during_eval)

    def start_over(self) -> None:
        super().start_over()
        self._alignment = self._alignment.renewed()
        self._summarized = False

    @property
    def state_key(self) -> str:
        """Tells this callback's state from that of others in the checkpoint."""
        return f"{type(self).__name__}(every_n_steps={self.every_n_steps})"

    def check(self) -> None:
        # A probe or a model that cannot be read is told now, not in the middle of the run.
        self._measure()

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
            self._summarized = summarize_by_maximum(self.trainer, self.guard, *SUMMARIZED_BY_MAXIMUM)

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
        return first_batch(dataset, trainer.data_collator, self._num_pairs)
