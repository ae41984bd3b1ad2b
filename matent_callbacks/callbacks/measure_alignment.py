"""Measures image-text alignment once, outside of a training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from matent_callbacks.callbacks.alignment_measurement import AlignmentMeasurement
from matent_callbacks.callbacks.alignment_reading import Stages


def measure_alignment(
    model: nn.Module,
    probe: Any,
    *,
    basis: Literal["effective_rank", "entropy"] = "effective_rank",
    metrics: str | Iterable[str] = "effective_rank",
    pair_measures: Iterable[str] | None = None,
    stages: Stages | None = None,
    towers: tuple[str, str] | None = None,
    k: int = 10,
    alpha: float = 1.0,
) -> dict[str, float]:
    """Measure once what ``AlignmentCallback`` logs: how well image and text agree inside a model, on a probe of pairs.

    This is side-effect-free inference: evaluation mode, no gradients, and the model is left as it was.

    Args:
        model: A vision-language model or a dual encoder, wrapped or not.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; or a mapping of
            several named probes, whose names are put before the names of their values.
        basis: What the two ratios are computed from, ``"effective_rank"`` or ``"entropy"``.
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Any of ``cka``, ``cka_debiased``, ``cka_z``, ``mutual_knn``, ``mutual_knn_z``,
            ``mutual_information``, ``modality_gap`` and, of vision-language models, ``grounding`` and
            ``image_text_shift``. ``None``: all of a dual encoder; ``cka_debiased``, ``cka_z``, ``mutual_knn``,
            ``mutual_knn_z``, ``grounding`` and ``image_text_shift`` of a vision-language model, as far as the probe
            has enough pairs and labels. Without the last two there is no second forward.
        stages: For a model whose stages are not found: a function from (model, batch) to the five
            :class:`~matent_callbacks.capture.vision_language.Stage` and the number of samples it left out, or a
            mapping of five functions from (model, batch) to ``(hidden_states, mask)``.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Number of neighbours in ``mutual_knn`` and ``mutual_knn_z``.
        alpha: Order of ``mutual_information``.

    Returns:
        The values by the names under which the callback logs them.

    Raises:
        ValueError: If an argument is out of range, or the probe or the model cannot be read.

    Example:
        >>> from matent_callbacks import measure_alignment
        >>> # measure_alignment(clip_model, {"input_ids": ids, "pixel_values": pixels})["alignment/cka"]
    """
    return AlignmentMeasurement(
        probe=probe,
        basis=basis,
        metrics=metrics,
        pair_measures=pair_measures,
        stages=stages,
        towers=towers,
        k=k,
        alpha=alpha,
    ).measure(model)
