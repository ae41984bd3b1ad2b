"""The modality integration rate against its definition, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from matent_callbacks.functional import frechet_distance, modality_distance, modality_integration_rate

RANDOM = torch.Generator().manual_seed(0)


def rows(count: int, width: int, *, mean: float = 0.0) -> Tensor:
    spread = torch.linspace(0.1, 3.0, width, dtype=torch.float64)
    return torch.randn(count, width, generator=RANDOM, dtype=torch.float64) * spread + mean


def frechet(x: Tensor, y: Tensor) -> float:
    """With a square root of the product of the covariances, by its eigenvalues."""
    a, b = (np.atleast_2d(np.cov(each.numpy(), rowvar=False)) for each in (x, y))
    means = (x.mean(0) - y.mean(0)).square().sum().item()
    roots = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None))
    return float(means + np.trace(a) + np.trace(b) - 2 * roots.sum())


def distance(image: Tensor, text: Tensor) -> float:
    scale = text.norm(dim=1).mean()
    cleaned = []
    for tokens in (image / scale, text / scale):
        norms = tokens.norm(dim=1)
        tokens = tokens.clone()
        for i, norm in enumerate(norms):
            if abs(norm - norms.mean()) > 3 * norms.std():
                tokens[i] *= norms.median() / norm
        cleaned.append(tokens)
    return frechet(*cleaned)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 16), (20, 9, 32), (64, 200, 64), (2, 2, 1), (10, 300, 12)])
def test_frechet_distance_of_more_and_of_fewer_rows_than_features(n, m, d):
    x, y = rows(n, d), rows(m, d, mean=1.0)
    assert frechet_distance(x, y).item() == pytest.approx(frechet(x, y), rel=1e-6)
    assert frechet_distance(y, x).item() == pytest.approx(frechet_distance(x, y).item(), rel=1e-12)
    assert frechet_distance(x.float(), y.float()).item() == pytest.approx(frechet(x, y), rel=1e-5)
    assert frechet_distance(x, x).item() == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_narrow_clouds_far_from_the_origin():
    x, y = rows(200, 8) / 100 + 50, 2 * rows(200, 8) / 100 + 50
    assert frechet_distance(x.float(), y.float()).item() == pytest.approx(frechet(x, y), rel=1e-3)


def test_distance_divides_by_the_length_of_text_and_tames_long_tokens():
    image, text = rows(80, 12, mean=2.0), rows(50, 12)
    image[3] *= 40
    text[7] *= 60
    text[9] = 0
    expected = distance(image, text)
    assert modality_distance(image, text).item() == pytest.approx(expected, rel=1e-9)
    # The scale of the layer is none of its business, and a long token is.
    assert modality_distance(1000 * image, 1000 * text).item() == pytest.approx(expected, rel=1e-9)
    assert frechet(image / text.norm(dim=1).mean(), text / text.norm(dim=1).mean()) > 2 * expected


def test_rate_is_the_logarithm_of_the_sum_over_layers():
    layers = [(rows(40, 6, mean=float(i)), rows(30, 6)) for i in range(3)]
    rate = modality_integration_rate(*zip(*layers, strict=True))
    assert rate.item() == pytest.approx(math.log10(sum(distance(*layer) for layer in layers)), rel=1e-9)


def test_tokens_that_are_not_finite_are_left_out():
    image, text = rows(40, 6, mean=1.0), rows(30, 6)
    expected = modality_distance(image[1:], text[:-1]).item()
    image[0, 2], text[-1, 0] = math.nan, math.inf
    assert modality_distance(image, text).item() == pytest.approx(expected, rel=1e-12)
    assert modality_distance(image[:2], text).isnan()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 2), torch.ones(3, 4)), ValueError, "`text` must have as many features as `image`, 2, got 4"),
        ((torch.ones(3), torch.ones(3, 4)), ValueError, r"`image` must have shape \(tokens, features\), got \(3,\)"),
        ((torch.ones(3, 2).int(), torch.ones(3, 2)), TypeError, "`image` must be a floating point tensor, got"),
        ((torch.ones(3, 2), [1.0]), TypeError, "`text` must be a floating point tensor, got list"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        modality_distance(*arguments)


def test_unequal_numbers_of_layers():
    with pytest.raises(ValueError, match="a tensor for each layer, one at least, got 1 and 2"):
        modality_integration_rate([torch.ones(3, 2)], [torch.ones(3, 2)] * 2)
