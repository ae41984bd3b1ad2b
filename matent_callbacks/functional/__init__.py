"""Pure tensor functions: every formula of the package, once, without state and without a framework."""

from matent_callbacks.functional.alignment import image_reduction_ratio, image_text_alignment
from matent_callbacks.functional.chance import pairing_z_score
from matent_callbacks.functional.drift import subspace_overlap, token_cosine
from matent_callbacks.functional.entropy import effective_rank, matrix_entropy, spectral_summary
from matent_callbacks.functional.modality import frechet_distance, modality_distance, modality_integration_rate
from matent_callbacks.functional.pairs import (
    debiased_cka,
    linear_cka,
    matrix_mutual_information,
    modality_gap,
    mutual_knn,
)
from matent_callbacks.functional.sinks import sink_tokens
from matent_callbacks.functional.spectrum import spectrum
from matent_callbacks.functional.trajectory import curvature

__all__ = [
    "curvature",
    "debiased_cka",
    "effective_rank",
    "frechet_distance",
    "image_reduction_ratio",
    "image_text_alignment",
    "linear_cka",
    "matrix_entropy",
    "matrix_mutual_information",
    "modality_distance",
    "modality_gap",
    "modality_integration_rate",
    "mutual_knn",
    "pairing_z_score",
    "sink_tokens",
    "spectral_summary",
    "spectrum",
    "subspace_overlap",
    "token_cosine",
]
