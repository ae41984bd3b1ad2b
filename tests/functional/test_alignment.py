"""The paper's ratios: values, shapes, precision and bad input."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from matent_callbacks.functional import image_reduction_ratio, image_text_alignment


def test_ratios_of_the_paper():
    before, after = torch.tensor([8.0, 10.0, 5.0, 0.0]), torch.tensor([2.0, 10.0, 6.0, 3.0])
    assert image_reduction_ratio(before, after).tolist() == pytest.approx([0.75, 0, -0.2, math.nan], nan_ok=True)
    three = torch.tensor([[3.0, 7.0, 0.0, 0.0], [6.0, 7.0, 0.0, 0.0], [9.0, 7.0, 2.0, 0.0]])
    for order in permutations(three):
        assert image_text_alignment(*order).tolist() == pytest.approx([2 / 3, 1, 1 / 3, math.nan], nan_ok=True)
    assert image_text_alignment(torch.tensor(1.0), 2.0, math.nan).isnan()


def test_ratios_take_numbers_batches_and_any_precision():
    assert image_reduction_ratio(8, 2.0).dtype == torch.float32
    assert image_reduction_ratio(8, 2.0).shape == ()
    assert image_reduction_ratio(torch.tensor([4.0, 8.0]), 2).tolist() == [0.5, 0.75]
    assert image_reduction_ratio(8.0, torch.tensor([4.0, 2.0])).tolist() == [0.5, 0.75]
    assert image_text_alignment(torch.tensor(2.0), torch.tensor([4.0, 2.0]), 3).tolist() == pytest.approx([0.75, 7 / 9])
    exact = image_reduction_ratio(torch.tensor(3.0, dtype=torch.float64), 1.0)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(2 / 3, abs=1e-15)
    halves = torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.bfloat16)
    assert image_reduction_ratio(*halves).item() == pytest.approx(2 / 3, abs=1e-7)
    e = torch.tensor(3.0, requires_grad=True)
    image_reduction_ratio(e, 1.0).backward()
    assert e.grad.item() == pytest.approx(1 / 9)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_bad_quantities_are_named(position):
    calls = [(image_text_alignment, f"e{position + 3}", 3)]
    if position < 2:
        calls.append((image_reduction_ratio, f"e{position + 1}", 2))
    for function, name, count in calls:
        for value, error, message in [
            ("3", TypeError, f"`{name}` must be a number or a floating point tensor, got str"),
            (torch.tensor([1, 2]), TypeError, f"`{name}` must be a number or a floating point tensor, got torch.int64"),
            (torch.ones(2, 2), ValueError, rf"`{name}` must have shape \(\) or \(B,\), got \(2, 2\)"),
        ]:
            arguments = [torch.tensor([1.0, 2.0])] * count
            arguments[position] = value
            with pytest.raises(error, match=message):
                function(*arguments)
    with pytest.raises(ValueError, match=r"`e2` must have the shape of `e1`, \(3,\), got \(4,\)"):
        image_reduction_ratio(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match=r"`e5` must have the shape of `e4`, \(3,\), got \(1,\)"):
        image_text_alignment(1.0, torch.ones(3), torch.ones(1))
