"""Draws curves over steps, and the spectrum of one layer, on a given axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from matent_callbacks.plot._style import BLUE, FIVE, ORANGE, mark, rank_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The last curve stands out; the others also differ in their dashes.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def step_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    ax: Axes,
    unit: str,
    points: Iterable[str] = (),
    stop: float | None = None,
    alarms: Iterable[float] = (),
    ranks: bool = False,
) -> None:
    """Draw quantities over the steps of training.

    Args:
        curves: Steps and values of each curve by its name, six at most. The last one that is a line stands out.
        ax: The axis to draw on.
        unit: What the vertical axis shows, and in which unit.
        points: Names of the curves that are drawn as points, such as evaluations.
        stop: The step that is marked as the one at which a plateau was reached.
        alarms: Steps that are marked as those at which an alarm of a collapse was raised.
        ranks: Whether ratios of the values matter, not differences, as for effective ranks: the axis is logarithmic
            where they span more than a decade.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from matent_callbacks.plot import step_curves
        >>> figure, ax = plt.subplots()
        >>> step_curves({"training": ([1, 2], [3.0, 2.5])}, ax=ax, unit="loss (nats per token)")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('step', 'loss (nats per token)')
    """
    points = set(points)
    lines = [name for name in curves if name not in points]
    for i, name in enumerate(lines):
        steps, values = curves[name]
        if i == len(lines) - 1:
            ax.plot(steps, values, color=BLUE, linewidth=1.8, marker="." if len(steps) < 30 else "", label=name)
        else:
            ax.plot(steps, values, color=FIVE[i % 5], linewidth=1.4, linestyle=_DASHES[1 + i % 4], label=name)
    for i, name in enumerate(name for name in curves if name in points):
        size = 4 if len(curves[name][0]) < 60 else 2
        ax.plot(
            *curves[name], color=(ORANGE, *FIVE)[i % 6], linestyle="none", marker="osD^v<"[i % 6], ms=size, label=name
        )
    mark(ax, stop=stop, alarm_steps=alarms)
    if ranks:
        rank_scale(ax)
    ax.set_xlabel("step")
    ax.set_ylabel(unit)


def spectrum_shares(readings: Mapping[str, Mapping[int, float]], *, ax: Axes) -> None:
    """Draw the share of the variance in the k strongest directions, over k.

    Args:
        readings: By the name of each reading, from earliest to latest: the share, from 0 to 1, of the k strongest
            directions by k, as logged in ``spectrum_top_<k>/<layer>``. The latest stands out.
        ax: The axis to draw on; k is on a logarithmic scale of base 2.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from matent_callbacks.plot import spectrum_shares
        >>> figure, ax = plt.subplots()
        >>> spectrum_shares({"step 1": {1: 0.9, 2: 1.0}, "step 100": {1: 0.4, 2: 0.6}}, ax=ax)
        >>> ax.get_xlabel()
        'strongest directions, k'
    """
    from matplotlib.ticker import NullFormatter, PercentFormatter

    for i, (name, shares) in enumerate(readings.items()):
        latest = i == len(readings) - 1
        colour, style = (BLUE, "-") if latest else (FIVE[1 + i % 4], _DASHES[1 + i % 4])
        ks = sorted(shares)
        values = [shares[k] for k in ks]
        ax.plot(ks, values, color=colour, linestyle=style, marker="o", ms=3, label=name, linewidth=1 + latest)
    ax.set_xscale("log", base=2)
    ks = sorted({k for shares in readings.values() for k in shares})
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("strongest directions, k")
    ax.set_ylabel("share of the variance")
