"""Readings of a monitor at the ends of what float32 can hold: right, or NaN with a warning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from matent_callbacks import EntropyMonitor

NAMES = (
    "matrix_entropy",
    "effective_rank",
    "sequence_matrix_entropy",
    "embedding_matrix_entropy",
    "embedding_rankme",
    "curvature",
    "holevo_information",
)


def reading(states: torch.Tensor, metrics: tuple[str, ...] = NAMES, **arguments) -> dict[str, float]:
    monitor = EntropyMonitor(nn.Sequential(nn.Identity()), "0", metrics=metrics, **arguments)
    monitor.start(attention_mask=mask(len(states)))
    monitor.model(states)
    monitor.stop()
    return monitor.compute()


def mask(batch: int) -> torch.Tensor:
    found = torch.ones(batch, 12)
    found[0, 9:] = 0
    return found


def states(batch: int, scale: float) -> torch.Tensor:
    return (torch.rand(batch, 12, 16, generator=torch.Generator().manual_seed(0)) - 0.4) * scale


@pytest.mark.parametrize("embedding", ["mean", "last"])
@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e22, 3e38])
def test_scale_does_not_matter(scale, batch, embedding):
    rel = 1e-3 if scale == 1e-40 else 1e-4  # the numbers themselves have 17 bits there
    found = reading(states(batch, scale), embedding=embedding)
    assert found == pytest.approx(reading(states(batch, 1.0), embedding=embedding), rel=rel)


@pytest.mark.parametrize("batch", [1, 40])  # as kept tokens, and as moments
@pytest.mark.parametrize("scale", [1e-40, 1e-22, 1e22, 3e38])
def test_rankme_without_unit_lengths_is_never_wrong_without_a_word(scale, batch):
    expected = reading(states(batch, 1.0), ("rankme",))["rankme/0"]
    if batch == 1:
        assert reading(states(batch, scale), ("rankme",))["rankme/0"] == pytest.approx(expected, rel=1e-3)
        return
    with pytest.warns(UserWarning, match="their squares are out of the range of the statistics' dtype"):
        assert math.isnan(reading(states(batch, scale), ("rankme",))["rankme/0"])
    exact = {"abs": 1e-3} if scale == 1e-40 else {"rel": 1e-4}
    assert reading(states(batch, scale), ("rankme",), dtype=torch.float64)["rankme/0"] == pytest.approx(
        expected, **exact
    )
