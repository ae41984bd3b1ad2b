"""Half of a symmetric matrix."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from matent_callbacks.accumulate.symmetric import add_second_moment, lower_triangle, symmetric
from tests.accumulate.packed import pack


# Narrow and wide enough to be halved, even and odd.
@pytest.mark.parametrize("d", [1, 2, 5, 64, 511, 512, 1027])
def test_packed_is_the_matrix_in_half_of_the_numbers(d):
    torch.manual_seed(0)
    z = torch.randn(50, d, dtype=torch.float64)
    expected = z.T @ z
    packed = z.new_zeros((d + 1) // 2, d + 1)
    add_second_moment(packed, z)
    assert packed.numel() == (d + 1) // 2 * (d + 1)
    assert_close(packed, pack(expected))
    assert_close(symmetric(lower_triangle(packed)), expected)
    assert_close(lower_triangle(packed).tril(), expected.tril())
    # What is not filled in must not be left to chance: it is added, compared and sent.
    assert torch.isfinite(packed).all()
