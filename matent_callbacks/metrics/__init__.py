"""The quantities as torchmetrics classes, which accumulate them over batches and ranks."""

from matent_callbacks.metrics.image_text_alignment import ImageTextAlignment
from matent_callbacks.metrics.pooled import EffectiveRank, MatrixEntropy
from matent_callbacks.metrics.sequence import SequenceEffectiveRank, SequenceMatrixEntropy

__all__ = ["EffectiveRank", "ImageTextAlignment", "MatrixEntropy", "SequenceEffectiveRank", "SequenceMatrixEntropy"]
