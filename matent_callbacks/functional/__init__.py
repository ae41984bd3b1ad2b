"""Pure tensor functions: every formula of the package, once, without state and without a framework."""

from matent_callbacks.functional.entropy import effective_rank, matrix_entropy, spectral_summary
from matent_callbacks.functional.spectrum import spectrum

__all__ = ["effective_rank", "matrix_entropy", "spectral_summary", "spectrum"]
