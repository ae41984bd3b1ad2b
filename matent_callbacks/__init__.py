"""See what representations do while a transformer trains: matrix entropy, effective rank, image-text alignment."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matent_callbacks.alignment.measurement import measure_alignment
    from matent_callbacks.alignment.vision_language import Stage
    from matent_callbacks.capture.meshes import parallel_groups
    from matent_callbacks.collapse import CollapseDetector
    from matent_callbacks.loop import LoopMonitor
    from matent_callbacks.metrics import (
        EffectiveRank,
        ImageTextAlignment,
        MatrixEntropy,
        SequenceEffectiveRank,
        SequenceMatrixEntropy,
    )
    from matent_callbacks.monitor import EntropyMonitor
    from matent_callbacks.plateau import PlateauDetector
    from matent_callbacks.untrained import untrained_like

__version__ = "0.1.0"

__all__ = [
    "CollapseDetector",
    "EffectiveRank",
    "EntropyMonitor",
    "ImageTextAlignment",
    "LoopMonitor",
    "MatrixEntropy",
    "PlateauDetector",
    "SequenceEffectiveRank",
    "SequenceMatrixEntropy",
    "Stage",
    "measure_alignment",
    "parallel_groups",
    "untrained_like",
]

_MODULES = {
    "CollapseDetector": "collapse",
    "EntropyMonitor": "monitor",
    "LoopMonitor": "loop",
    "PlateauDetector": "plateau",
    "Stage": "alignment.vision_language",
    "measure_alignment": "alignment.measurement",
    "parallel_groups": "capture.meshes",
    "untrained_like": "untrained",
}
_SUBMODULES = ("functional", "metrics", "monitor", "plateau", "untrained")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing torch takes seconds, and torchmetrics imports transformers where it is installed.
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'metrics')}")
        value = globals()[name] = getattr(module, name)
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
