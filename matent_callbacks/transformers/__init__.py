"""Callbacks for the Hugging Face ``Trainer``."""

try:
    import transformers  # noqa: F401
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(
        "matent_callbacks.transformers needs transformers: pip install 'matent-callbacks[transformers]'"
    ) from error

from matent_callbacks.transformers._alignment import AlignmentCallback
from matent_callbacks.transformers._matrix_entropy import MatrixEntropyCallback
from matent_callbacks.transformers._observers import CollapseAlarm, PlateauStopping
from matent_callbacks.transformers._reading_printer import ReadingPrinter

__all__ = ["AlignmentCallback", "CollapseAlarm", "MatrixEntropyCallback", "PlateauStopping", "ReadingPrinter"]
