"""See what representations do while a transformer trains: matrix entropy, effective rank, image-text alignment."""

from typing import TYPE_CHECKING, Any

from matent_callbacks.callbacks.alignment_measurement import measure_alignment
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.plateau import PlateauDetector
from matent_callbacks.untrained import untrained_like

if TYPE_CHECKING:
    from matent_callbacks.metrics import (
        EffectiveRank,
        ImageTextAlignment,
        MatrixEntropy,
        SequenceEffectiveRank,
        SequenceMatrixEntropy,
    )

__version__ = "0.1.0"

__all__ = [
    "EffectiveRank",
    "EntropyMonitor",
    "ImageTextAlignment",
    "MatrixEntropy",
    "PlateauDetector",
    "SequenceEffectiveRank",
    "SequenceMatrixEntropy",
    "measure_alignment",
    "untrained_like",
]


def __getattr__(name: str) -> Any:
    # torchmetrics imports transformers where it is installed, so it waits until a metric class is asked for.
    if name in __all__:
        from matent_callbacks import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
