"""What the callbacks compare with the reference: the tokens of each probe, and how the reference is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matent_callbacks.accumulate.probe_tokens import ProbeTokens
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.capture.inference import device_of
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.monitor.comparison import Comparison


def check_drift_tokens(drift_tokens: Any) -> int:
    """Return ``drift_tokens``, or raise ValueError unless it is a whole number of at least 4."""
    if isinstance(drift_tokens, bool) or not isinstance(drift_tokens, int) or drift_tokens < 4:
        raise ValueError(f"`drift_tokens` must be a whole number of at least 4, got {drift_tokens!r}.")
    return drift_tokens


class Drift:
    """The comparisons of a run, one for each probe.

    Args:
        metrics: Which names of :data:`.COMPARISONS` are asked for.
        most: How many tokens are compared at most.
        guard: That of the callback.
    """

    def __init__(self, metrics: Sequence[str], most: int, guard: Guard) -> None:
        self.metrics = tuple(metrics)
        self.most = most
        self.comparisons: dict[str, Comparison] = {}
        """Those that have a reference, by the prefix of the probe."""
        self._guard = guard

    def forget(self) -> None:
        """Forget the reference."""
        self.comparisons = {}

    def keep(
        self, prefix: str, comparison: Comparison, kept: Mapping[str, ProbeTokens], monitor: EntropyMonitor
    ) -> None:
        """Keep what a monitor read of a probe as its reference."""
        with self._guard("the comparison with the reference"):
            comparison.keep(kept, monitor.failed, device_of(monitor.model))
            self.comparisons[prefix] = comparison
