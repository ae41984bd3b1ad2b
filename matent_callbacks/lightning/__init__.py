"""Callbacks for PyTorch Lightning, for the Trainer of the package ``lightning`` or of ``pytorch_lightning``."""

try:
    import lightning.pytorch  # noqa: F401
except ImportError:
    try:
        import pytorch_lightning  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "matent_callbacks.lightning needs lightning: pip install 'matent-callbacks[lightning]'"
        ) from error

from matent_callbacks.lightning._alignment import AlignmentCallback
from matent_callbacks.lightning._matrix_entropy import MatrixEntropyCallback
from matent_callbacks.lightning._observers import CollapseAlarm, PlateauStopping

__all__ = ["AlignmentCallback", "CollapseAlarm", "MatrixEntropyCallback", "PlateauStopping"]
