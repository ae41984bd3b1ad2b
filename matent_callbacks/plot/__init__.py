"""Pictures of a run, from the records that a Trainer keeps.

Needs matplotlib: ``pip install 'matent-callbacks[plot]'``.
"""

from matent_callbacks.plot._alignment import alignment_overview
from matent_callbacks.plot._style import series
from matent_callbacks.plot._training import layer_heatmap, training_overview

__all__ = ["alignment_overview", "layer_heatmap", "series", "training_overview"]
