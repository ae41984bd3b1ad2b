"""Computes the measures of image-text pairs by the names that they are logged under."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from matent_callbacks.functional.chance import pairing_z_score
from matent_callbacks.functional.pairs import (
    debiased_cka,
    linear_cka,
    matrix_mutual_information,
    modality_gap,
    mutual_knn,
)

VECTOR_MEASURES = ("cka", "mutual_knn", "mutual_information", "modality_gap", "cka_debiased", "cka_z", "mutual_knn_z")
"""Computed from one vector for the image and one for the text of each pair."""
EXCHANGE_MEASURES = ("grounding", "image_text_shift")
"""Of vision-language models only: pairs compared with exchanged images."""
PAIR_MEASURES = (*VECTOR_MEASURES, *EXCHANGE_MEASURES)
OF_VISION_LANGUAGE_MODELS = ("cka_debiased", "cka_z", "mutual_knn", "mutual_knn_z", *EXCHANGE_MEASURES)
OF_DUAL_ENCODERS = VECTOR_MEASURES


def pairs_needed(measure: str, *, k: int) -> int:
    """Return the least number of pairs for which a measure is defined."""
    if measure.startswith("mutual_knn"):
        return k + 1
    return 4 if measure in ("cka_debiased", "cka_z") else 2


def measure_pairs(image: Tensor, text: Tensor, measures: Sequence[str], *, k: int, alpha: float) -> dict[str, Tensor]:
    """Compute some of ``VECTOR_MEASURES`` for paired rows ``(n, d1)`` and ``(n, d2)``."""
    neighbours = functools.partial(mutual_knn, k=k)
    functions: dict[str, Callable[[], Tensor]] = {
        "cka": lambda: linear_cka(image, text),
        "cka_debiased": lambda: debiased_cka(image, text),
        "cka_z": lambda: pairing_z_score(linear_cka, image, text),
        "mutual_knn": lambda: neighbours(image, text),
        "mutual_knn_z": lambda: pairing_z_score(neighbours, image, text),
        "mutual_information": lambda: matrix_mutual_information(image, text, alpha=alpha),
        "modality_gap": lambda: modality_gap(image, text),
    }
    return {name: functions[name]() for name in measures}
