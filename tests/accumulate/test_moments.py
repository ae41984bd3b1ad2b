"""One type of moments: how tokens and other moments are added to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from matent_callbacks.accumulate.moments import empty_moments, merge_moments, scatter_about
from matent_callbacks.accumulate.pooled_tokens import PooledTokens
from matent_callbacks.accumulate.sequences import in_groups
from matent_callbacks.accumulate.symmetric import lower_triangle, symmetric

WIDTH = 6


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and masks; the mean is 1,000 times the spread, and one batch has no valid token."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size, length, valid in [(2, 9, 5), (1, 3, 3), (2, 4, 0), (3, 20, 13)]:
        mask = torch.zeros(size, length, dtype=torch.bool)
        mask[:, :valid] = True
        found.append((1000 + torch.randn(size, length, WIDTH, generator=generator, dtype=torch.float64), mask))
    return found


def pooled(*given, center=None, keep=0.0, dtype=torch.float32) -> PooledTokens:
    tokens = PooledTokens(center, empty_moments(dtype=dtype), keep=keep)
    for hidden, mask in given:
        for sequences in in_groups(hidden, mask, dtype=dtype):
            tokens.update(sequences, normalize=False)
    return tokens


def rows(*given, center=None) -> torch.Tensor:
    """The tokens that count, as the covariance sees them."""
    parts = [states[valid] for hidden, mask in given for states, valid in zip(hidden, mask, strict=True) if valid.any()]
    if center == "sequence":
        parts = [part - part.mean(0) for part in parts]
    return torch.cat(parts)


@pytest.mark.parametrize("center", ["sequence", "global", None])
def test_moments_are_those_of_all_tokens_however_they_came(center):
    first, second = batches(0), batches(1)
    z = rows(*first, *second, center=center)
    mean = z.mean(0) if center != "sequence" else torch.zeros(WIDTH, dtype=torch.float64)
    scatter = (z - mean).T @ (z - mean)
    ways = {
        "batch by batch": pooled(*first, *second, center=center).moments(),
        "kept, then folded": pooled(*first, *second, center=center, keep=1000.0).moments(),
        "merged": merge_moments(pooled(*first, center=center).moments(), pooled(*second, center=center).moments()),
        "nothing, then all": merge_moments(
            empty_moments(dtype=torch.float32), pooled(*first, *second, center=center).moments()
        ),
        "all, then nothing": merge_moments(
            pooled(*first, *second, center=center).moments(), empty_moments(dtype=torch.float32)
        ),
    }
    for way, moments in ways.items():
        counts = (moments.num_tokens.item(), moments.num_sequences.item(), moments.num_nonfinite.item())
        assert counts == (len(z), 12, 0), way
        assert_close(symmetric(lower_triangle(moments.scatter)), scatter.float(), rtol=1e-4, atol=2e-3, msg=way)
        if center == "sequence":
            assert moments.mean.shape == (0,)
        else:
            assert_close(moments.mean, mean.float(), msg=way)


def test_merging_leaves_the_other_as_it_is():
    for mine, theirs in itertools.product((batches(0), []), (batches(1),)):
        other = pooled(*theirs).moments()
        before = [tensor.clone() for tensor in other]
        merged = merge_moments(pooled(*mine).moments(), other)
        merge_moments(merged, pooled(*batches(2)).moments())
        assert all(torch.equal(a, b) for a, b in zip(other, before, strict=True))


def test_scatter_about_another_mean():
    moments = pooled(*batches(0), dtype=torch.float64).moments()
    z = rows(*batches(0))
    about = z.mean(0) + torch.arange(WIDTH)
    before = moments.scatter.clone()
    assert_close(symmetric(lower_triangle(scatter_about(moments, about))), (z - about).T @ (z - about))
    assert torch.equal(moments.scatter, before)


@pytest.mark.parametrize("center", ["sequence", "global", None])
def test_gram_matrix_of_kept_tokens_has_the_eigenvalues_of_the_covariance(center):
    given = batches(0)
    kept, folded = (pooled(*given, center=center, keep=keep, dtype=torch.float64) for keep in (1000.0, 0.0))
    gram, covariance = kept.matrix(), folded.matrix()
    assert gram.size == sum(mask.numel() for _, mask in given)
    assert covariance.size == WIDTH
    eigenvalues = torch.linalg.eigvalsh(gram.lower())
    assert_close(eigenvalues[-WIDTH:], torch.linalg.eigvalsh(covariance.lower()))
    assert eigenvalues[:-WIDTH].abs().max() < 1e-6 * eigenvalues[-1]


def test_kept_tokens_of_two_sets_are_kept_together_as_long_as_they_are_few():
    first, second = batches(0)[1:2], batches(1)[1:2]  # 3 tokens each
    together, too_many = pooled(*first, keep=1.0), pooled(*first, keep=0.9)
    together.merge(pooled(*second, keep=1.0))
    too_many.merge(pooled(*second, keep=0.9))
    assert together.matrix().gram is not None
    assert too_many.matrix().gram is None
    assert_close(together.moments().scatter, too_many.moments().scatter, rtol=1e-4, atol=1e-4)
