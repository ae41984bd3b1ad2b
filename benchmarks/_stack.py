"""A model that does nothing, so that only the cost of the monitor is measured."""

from __future__ import annotations

from torch import nn


def identities(layers: int) -> nn.Sequential:
    """Create layers that return their input."""
    return nn.Sequential(*(nn.Identity() for _ in range(layers)))
