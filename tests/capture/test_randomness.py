"""Random numbers are drawn on as if nothing had been drawn on the side, whoever draws them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from matent_callbacks.capture.inference import preserved
from matent_callbacks.capture.probes import first_batch


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Augmented(nn.Module):
    """Draws as SpecAugment does, from NumPy."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        return draw()

    def forward(self) -> list[float]:
        return draw()


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def look_at_data() -> Any:
    return first_batch(Augmented(), lambda examples: [*examples, draw()], 3)


def run_a_model() -> Any:
    with preserved(model := Augmented()):
        return model()


@pytest.mark.parametrize("side_effect", [look_at_data, run_a_model])
def test_every_generator_is_as_before(side_effect):
    seed()
    expected = draw()
    seed()
    assert side_effect()
    assert draw() == expected


def test_an_error_on_the_side_leaves_them_alone_too():
    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError):
        first_batch(Augmented(), lambda examples: 1 / 0, 3)
    assert draw() == expected
