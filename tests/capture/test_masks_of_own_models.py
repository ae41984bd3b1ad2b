"""Masks in models of one's own: handed to blocks outside of any forward, or under a name that says nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.conftest import slow_pooled_entropy

WIDTH = 16
MASK = torch.arange(12) < torch.tensor([[12], [5], [8]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, pad: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        padding = pad if attention_mask is None else ~attention_mask
        return x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)


def run(model: Parts, x: Tensor, **masks: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x, **{name: mask.clone() for name, mask in masks.items()})
    return model.norm(x)


class Model(Parts):
    forward = run


def read(model: Parts, monitor: EntropyMonitor, **masks: Tensor) -> tuple[float, Tensor]:
    x = torch.randn(*MASK.shape, WIDTH, generator=torch.Generator().manual_seed(1))
    with monitor:
        states = model(x, **masks) if isinstance(model, Model) else run(model, x, **masks)
    return monitor.compute()["matrix_entropy/last"], states.detach()


@pytest.mark.parametrize("kind", [Model, Parts])
def test_the_norm_after_the_blocks_has_their_mask_outside_of_a_forward_too(kind, recwarn):
    model = kind()
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    entropy, states = read(model, monitor, attention_mask=MASK)
    assert entropy == pytest.approx(slow_pooled_entropy(states, MASK), abs=1e-6)
    assert not recwarn.list
    assert not monitor._capture._events._masks_alone


@pytest.mark.parametrize("layers", ["all", "last"])
def test_an_argument_that_may_be_a_mask_is_told_once_by_its_name(layers, recwarn):
    model = Model()
    monitor = EntropyMonitor(model, layers, dtype=torch.float64)
    entropy, states = read(model, monitor, pad=~MASK)
    read(model, monitor, pad=~MASK)
    (told,) = recwarn.list
    assert re.match(r"Padding is counted in .*last, if the argument 'pad' marks it: .* `mask=`", str(told.message))
    assert entropy == pytest.approx(slow_pooled_entropy(states), abs=1e-6)


def test_an_argument_that_marks_nothing_is_not_told(recwarn):
    read(model := Model(), EntropyMonitor(model), pad=torch.zeros_like(MASK))
    assert not recwarn.list
