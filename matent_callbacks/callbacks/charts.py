"""Chooses which layers of a run get charts of their own in W&B: with 31 layers and evaluation there would be 124."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from matent_callbacks.accumulate.catalogue import ENTROPY_ERROR, METRICS, SPECTRUM_TOP
from matent_callbacks.monitor.decomposition import NONFINITE

Charts: TypeAlias = Literal["few", "all"]

# With more layers than this, those between first, middle and last are hidden.
_MOST = 6
_METRICS = "|".join((*METRICS, rf"{SPECTRUM_TOP}\d+", "diff_erank", NONFINITE, ENTROPY_ERROR))


class LayerCharts:
    """Hides the automatic charts of the layers between first, middle and last; their values are logged as before."""

    def __init__(self, charts: Charts) -> None:
        if charts not in ("few", "all"):
            raise ValueError(f"`charts` must be 'few' or 'all', got {charts!r}.")
        self._all = charts == "all"
        self._hidden: set[str] = set()

    def hide(
        self,
        names: Iterable[str],
        layers: Sequence[str],
        runs: Iterable[Any],
        *,
        sent_as: Callable[[str], str] = str,
        **definition: Any,
    ) -> None:
        """Hide the charts of those logged names that are of such a layer, once each.

        Args:
            names: Of logged values, with any prefix.
            layers: All layers, in their order.
            runs: Those of W&B; without any, nothing is remembered as hidden.
            sent_as: Maps a name to the one that W&B is sent.
            **definition: What else ``define_metric`` is told, such as the ``step_metric``.
        """
        runs = list(runs)
        if self._all or len(layers) <= _MOST or not runs:
            return
        shown = {layers[0], layers[len(layers) // 2], layers[-1]}
        between = "|".join(re.escape(layer) for layer in layers if layer not in shown)
        ours = re.compile(rf"(?:.*[_/])?(?:{_METRICS})/(?:{between})(?:/dataloader_idx_\d+)?")
        for name in names:
            if name not in self._hidden and ours.fullmatch(name):
                for run in runs:
                    run.define_metric(sent_as(name), hidden=True, **definition)
                self._hidden.add(name)
