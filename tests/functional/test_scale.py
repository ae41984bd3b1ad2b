"""The entropy of hidden states does not depend on their scale, up to the ends of what a dtype can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matent_callbacks import MatrixEntropy, SequenceMatrixEntropy
from matent_callbacks.accumulate import pieces
from matent_callbacks.functional import curvature, debiased_cka, linear_cka, matrix_entropy, mutual_knn

SCALES = [1e-40, 1e-30, 1e-22, 1.0, 1e22, 3e38]
MASK = torch.ones(3, 20)
MASK[0, 15:] = 0


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=tolerance)


def states(scale: float) -> Tensor:
    """Within the range of float32, with a mean: the largest magnitude is 0.6 of the scale."""
    return (torch.rand(3, 20, 16, generator=torch.Generator().manual_seed(0)) - 0.4) * scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("settings", [{}, {"center": False}, {"normalize": False}], ids=str)
def test_functions_and_metrics_of_each_sequence(scale, mask, settings):
    x = states(scale)
    expected = matrix_entropy(x.double(), mask, **settings)
    close(matrix_entropy(x, mask, **settings), expected)
    metric = SequenceMatrixEntropy(**settings)
    metric.update(x, mask)
    close(metric.compute(), expected.mean())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("center", ["sequence", "global", None])
def test_the_pooled_metric(scale, mask, center):
    found, exact = MatrixEntropy(center=center), MatrixEntropy(center=center, dtype=torch.float64)
    for metric in (found, exact):
        metric.update(states(scale), mask)
    close(found.compute(), exact.compute())


def test_tiny_and_huge_sequences_in_one_batch():
    x = states(1.0) * torch.tensor([1e-30, 1.0, 3e38])[:, None, None]
    close(matrix_entropy(x), matrix_entropy(x.double()))
    one, other = MatrixEntropy(), MatrixEntropy(dtype=torch.float64)
    one.update(x, MASK)
    other.update(x, MASK)
    close(one.compute(), other.compute())
    rows = states(1.0)[0] * torch.tensor([1e-30, 3e38]).repeat(10).unsqueeze(1)
    close(matrix_entropy(rows, center=False), matrix_entropy(rows.double(), center=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-200, 1e-22, 1e300])
def test_float64_that_float32_cannot_hold(scale, dtype):
    x = states(1.0).double() * scale
    close(matrix_entropy(x), matrix_entropy(states(1.0).double()), 1e-12)
    metric, exact = MatrixEntropy(dtype=dtype), MatrixEntropy(dtype=torch.float64)
    metric.update(x, MASK)
    exact.update(states(1.0), MASK)
    close(metric.compute(), exact.compute())


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.bfloat16, 1e-30)])
def test_half_precision_at_its_ends(dtype, scale):
    x = states(scale).to(dtype)
    close(matrix_entropy(x, MASK), matrix_entropy(x.double(), MASK))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [4, 16])  # by the covariance, and by the Gram matrix
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_that_are_read_part_by_part(scale, width, masked, monkeypatch):
    x = states(scale)[:, :15, :width]
    mask = MASK[:, :15].clone()
    mask[:, 7] = 1 - float(masked)
    exact = {}
    for metric in (SequenceMatrixEntropy, MatrixEntropy):
        exact[metric] = metric(dtype=torch.float64)
        exact[metric].update(x, mask)
    monkeypatch.setattr(pieces, "_PIECE", 4 * width * 4)
    for metric, expected in exact.items():
        found = metric()
        found.update(x, mask)
        close(found.compute(), expected.compute())


@pytest.mark.parametrize("scale", SCALES)
def test_curvature_and_measures_of_pairs(scale):
    x, y = states(scale)[0], states(1.0)[1]
    close(curvature(states(scale), MASK), curvature(states(scale).double(), MASK))
    for measure in (linear_cka, debiased_cka, mutual_knn):
        close(measure(x, y), measure(x.double(), y.double()), 2e-5)


@pytest.mark.parametrize("length", [6, 60])  # kept as they are, and as moments
@pytest.mark.parametrize("center", ["sequence", "global", None])
@pytest.mark.parametrize("scale", [*SCALES, 1e-18, 1e18])
@pytest.mark.parametrize("parts", [False, True])
def test_without_unit_length_the_pooled_metric_is_right_or_nan(length, center, scale, parts, monkeypatch):
    x = (torch.rand(length, 16, generator=torch.Generator().manual_seed(0)) - 0.4) * scale
    found, exact = (MatrixEntropy(center=center, normalize=False, dtype=d) for d in (torch.float32, torch.float64))
    exact.update(x)
    if parts:
        monkeypatch.setattr(pieces, "_PIECE", 4 * 16 * 4)
    found.update(x)
    value = found.compute()
    if scale == 1.0 or not value.isnan():
        close(value, exact.compute(), 2e-5)
