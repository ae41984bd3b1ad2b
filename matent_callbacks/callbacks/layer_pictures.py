"""Draws all layers of a run in two or three pictures, so that a logger needs no panel for each layer."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# A picture shows all readings so far: it is drawn again once their number has grown by this factor.
_GROWTH = 1.25
_MOST_RECORDS = 512
_DRIFT = "drift"


class LayerPictures:
    """Draws the layers of one metric at growing intervals, so that its cost vanishes in a long run."""

    def __init__(self, metrics: Sequence[str], prefixes: Sequence[str] = ("",)) -> None:
        """``prefixes`` are those of the names of values; each prefix has its own pictures."""
        self._prefixes = prefixes
        self._metric = "effective_rank" if "effective_rank" in metrics else metrics[0]
        self._drawn: float | None = None
        self._wait = 0

    def shown(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return those values of one reading that go into a picture."""
        shown = tuple(f"{prefix}{metric}/" for prefix in self._prefixes for metric in (self._metric, _DRIFT))
        return {key: value for key, value in values.items() if key.startswith(shown)}

    def draw(
        self, records: Sequence[Mapping[str, Any]], layers: Sequence[str], *, last: bool = False
    ) -> dict[str, np.ndarray]:
        """Draw the pictures by name, ``(height, width, 3)`` uint8; none unless they are due (``last``: they are).

        There are no pictures of fewer than two layers, nor without matplotlib.
        """
        if self._wait and not last:
            # There is one reading per call. Searching the records of a long run each time would cost more than drawing.
            self._wait -= 1
            return {}
        readings = {prefix: self._readings(records, layers, prefix) for prefix in self._prefixes}
        steps = {record["step"] for own in readings.values() for record in own}
        enough = len(steps) > (0 if last else 1) and max(steps) != self._drawn
        if len(layers) < 2 or not enough or importlib.util.find_spec("matplotlib") is None:
            return {}
        self._drawn = max(steps)
        self._wait = math.ceil(_GROWTH * len(steps)) - len(steps) - 1
        return {
            f"{prefix}layers/{name}": pixels
            for prefix, own in readings.items()
            if own
            for name, pixels in self._pixels(own)
        }

    def _readings(
        self, records: Sequence[Mapping[str, Any]], layers: Sequence[str], prefix: str
    ) -> list[dict[str, Any]]:
        """Step and values of the records that have any, with the prefix taken off their names."""
        metrics = (self._metric, _DRIFT)
        names = {f"{prefix}{metric}/{layer}": f"{metric}/{layer}" for metric in metrics for layer in layers}
        return [
            {"step": record["step"]} | {names[key]: value for key, value in record.items() if key in names}
            for record in records
            if not names.keys().isdisjoint(record)
        ]

    def _pixels(self, readings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from matent_callbacks.plot import layer_heatmap, layer_profile

        change = partial(layer_heatmap, change=True)
        logged = {key.partition("/")[0] for record in readings for key in record}
        pictures: dict[str, list[Callable[..., None]]] = {
            f"{self._metric}_profile": [layer_profile],
            # The change is below the values, on the same steps.
            f"{self._metric}_heatmap": [layer_heatmap, *([change] if len(readings) > 1 else [])],
            f"{_DRIFT}_profile": [layer_profile],
        }
        for name, panels in pictures.items():
            metric = name.rpartition("_")[0]
            if metric not in logged:
                continue
            figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
            canvas = FigureCanvasAgg(figure)
            for draw, ax in zip(panels, figure.subplots(len(panels), squeeze=False).flat, strict=True):
                draw(readings, metric, ax=ax)
            canvas.draw()  # type: ignore[no-untyped-call]
            yield name, np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def thinned(records: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return every second record, the latest included, once there are more than a picture can show."""
    return records if len(records) <= _MOST_RECORDS else records[::-2][::-1]
