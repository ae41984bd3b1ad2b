"""Draws a family of models: a quantity over size, with the fitted power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matent_callbacks.plot._style import BLUE, ORANGE, UNITS, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from matent_callbacks.scaling_law import PowerLaw


def scaling_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    fit: PowerLaw | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    names: Sequence[str] = (),
    size: str = "parameters",
    metric: str = "normalized_sequence_matrix_entropy",
    title: str = "",
) -> Figure:
    """Draw measured models over their size, and the power law with its 95 % band.

    Args:
        x: Sizes, positive.
        y: Values at these sizes, in the unit of ``metric``.
        fit: One of ``matent_callbacks.scaling_law.fit_power_laws``; None: the points alone.
        intervals: Ends of the error bar of each value.
        names: Of the models, beside their points.
        size: What ``x`` counts.
        metric: What ``y`` is.
        title: Above the picture.

    Returns:
        The figure; ``figure.savefig("scaling.png")`` writes it.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> from matent_callbacks.plot import scaling_law
        >>> scaling_law([1e5, 1e6], [0.7, 0.6]).axes[0].get_xlabel()
        'parameters'
    """
    import matplotlib.pyplot as plt
    import numpy as np

    if not len(x):
        raise ValueError("`x` must hold at least one size, and is empty.")
    figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    ends = np.array(intervals if intervals is not None else [(value, value) for value in y], dtype=float)
    errors = np.abs(ends.T - np.asarray(y, dtype=float))
    ax.errorbar(x, y, yerr=errors, color=BLUE, fmt="o", capsize=3, label="measured, 95 % over texts")
    middle = math.sqrt(min(x) * max(x))
    for place, name in zip(zip(x, y, strict=True), names, strict=False):
        # Where a falling curve is not; a long name on the side that has room.
        offset, ha, va = ((-6, -8), "right", "top") if place[0] > middle else ((6, 8), "left", "bottom")
        if len(name) < 15:
            offset, ha = (0, offset[1]), "center"
        text = ax.annotate(short(name, 40), place, offset, textcoords="offset points", ha=ha, va=va, fontsize="small")
        text.set_parse_math(False)
    if fit is not None:
        sizes = np.geomspace(min(x) / 1.5, max(x) * 1.5, 100).tolist()
        low, high = zip(*fit.band(sizes), strict=True)
        constant = "" if fit.c is None else f" + {fit.c.value:.3g}"
        formula = f"{fit.a.value:.3g} N^-{fit.b.value:.3g}{constant}"
        ax.plot(sizes, [fit(s) for s in sizes], color=ORANGE, label=formula)
        ax.fill_between(sizes, low, high, color=ORANGE, alpha=0.2, linewidth=0, label="95 % of the curve")
    ax.set_xscale("log")
    ax.set_xlabel(size)
    ax.set_ylabel(UNITS.get(metric, "matrix entropy / log d" if metric.startswith("normalized") else metric))
    ax.legend(frameon=False)
    if title:
        ax.set_title(title, parse_math=False)
    return figure
