"""Pictures of a run, from the records that a Trainer keeps.

Needs matplotlib: ``pip install 'matent-callbacks[plot]'``.
"""

from matent_callbacks.plot._alignment_overview import alignment_overview
from matent_callbacks.plot._curves import spectrum_shares, step_curves
from matent_callbacks.plot._layers import layer_heatmap, layer_profile
from matent_callbacks.plot._measured_layers import measured_layers
from matent_callbacks.plot._scaling import scaling_law
from matent_callbacks.plot._style import series
from matent_callbacks.plot._training_overview import training_overview

__all__ = [
    "alignment_overview",
    "layer_heatmap",
    "layer_profile",
    "measured_layers",
    "scaling_law",
    "series",
    "spectrum_shares",
    "step_curves",
    "training_overview",
]
