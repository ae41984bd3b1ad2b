"""Compares a measure of paired rows with its values for random pairings of the same rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._rows import paired_rows
from matent_callbacks.functional.pairs import (
    centred_gram,
    debiased_cka,
    is_neighbour,
    linear_cka,
    mutual_knn,
    unbiased_gram,
)

PairMeasure = Callable[[Tensor, Tensor], Tensor | float]

# How many entries of the matrices are processed at a time: so few that they stay in the cache.
_ENTRIES = 2**16
# A spread of no more than so many rounding errors of the value counts as zero.
_ROUNDINGS = 32


def pairing_z_score(
    measure: PairMeasure,
    x: Tensor,
    y: Tensor,
    *,
    permutations: int = 200,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compute how many standard deviations a measure of paired rows lies above random pairings of the same rows.

    :math:`(m - \mathrm{mean}(m_p)) / \mathrm{std}(m_p)`, with m the measure of ``x`` and ``y`` and :math:`m_p` those
    of ``x`` and permuted rows of ``y``. About 0 with deviation 1 for unrelated rows, whatever n, the widths and the
    measure. For related rows it grows with n: compare at equal n.

    For :func:`linear_cka`, :func:`debiased_cka` and :func:`mutual_knn` (or a :func:`functools.partial` of it with its
    ``k``) the Gram matrices and neighbours are computed once and only permuted. Any other function is called for each
    permutation.

    Args:
        measure: Function of ``(n, d1)`` and ``(n, d2)`` to a number or a tensor ``()``, larger for a closer relation.
        x: ``(n, d1)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d2)``. Pairs with NaN or Inf on either side are left out.
        permutations: How many random pairings, at least 2.
        generator: Source of the random pairings; ``None``: a generator of its own with a fixed seed, so that the same
            input gives the same number, and the same n the same pairings. The global random state is not touched.

    Returns:
        ``()``. NaN where the measure is, and where it is the same for every pairing, as :func:`modality_gap` is.

    Raises:
        TypeError: If ``measure`` is not callable or gives no number, ``x`` or ``y`` is not a floating point tensor,
            ``permutations`` not an int, or ``generator`` not a :class:`torch.Generator`.
        ValueError: If a shape is wrong or there are fewer than 2 permutations; and what ``measure`` raises.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import linear_cka, pairing_z_score
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        >>> abs(pairing_z_score(linear_cka, x, y)) < 3, pairing_z_score(linear_cka, x, x + y) > 10
        (tensor(True), tensor(True))
    """
    if not callable(measure):
        raise TypeError(f"`measure` must be a function of paired rows, got {type(measure).__name__}.")
    if isinstance(permutations, bool) or not isinstance(permutations, int):
        raise TypeError(f"`permutations` must be an int, got {type(permutations).__name__}.")
    if permutations < 2:
        raise ValueError(f"`permutations` must be at least 2, got {permutations}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator or None, got {type(generator).__name__}.")
    paired_x, paired_y = paired_rows(x, y)
    undefined = paired_x.new_full((), torch.nan)
    if len(paired_x) < 2:
        return undefined
    orders = _orders(len(paired_x), permutations, generator).to(paired_x.device)
    matrix = _matrix(measure)
    if matrix is None:
        value = _number(measure(paired_x, paired_y))
        values = torch.stack([_number(measure(paired_x, paired_y[order])) for order in orders])
    else:
        # The measure itself checks its arguments, and whether enough pairs are left.
        if _number(measure(x, y)).isnan():
            return undefined
        with full_precision(x.device):
            a, b = (matrix(rows).to(rows.dtype) for rows in (paired_x, paired_y))
            value, values = (a * b).sum(), _permuted_sums(a, b, orders)
    values, value = values.to(_widest(x.device)), value.to(_widest(x.device))
    spread = values.std()
    rounding = _ROUNDINGS * torch.finfo(paired_x.dtype).eps * torch.maximum(values.abs().amax(), value.abs())
    score: Tensor = torch.where(spread > rounding, (value - values.mean()) / spread, torch.nan)
    return score.to(paired_x)


def _matrix(measure: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a function that makes an ``(n, n)`` matrix of each side; None for a measure that is not known.

    The entrywise product of both sides' matrices sums to the measure, up to scale.
    """
    if measure is linear_cka:
        return centred_gram
    if measure is debiased_cka:
        return unbiased_gram
    function, options = (measure.func, measure.keywords) if isinstance(measure, functools.partial) else (measure, {})
    if function is mutual_knn and not getattr(measure, "args", ()):
        return functools.partial(is_neighbour, **{**(mutual_knn.__kwdefaults__ or {}), **options})
    return None


def _orders(n: int, permutations: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``(permutations, n)``, each row a permutation."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return torch.rand(permutations, n, generator=generator, device=generator.device).argsort(-1)


def _permuted_sums(a: Tensor, b: Tensor, orders: Tensor) -> Tensor:
    """Sum ``a * b``, both ``(n, n)``, for each permutation of the rows and columns of ``b``."""
    n = len(a)
    a, b = a.flatten(), b.flatten()
    if len(b) < 2**31:
        orders = orders.int()  # half of the memory to go through
    sums = []
    for chunk in torch.split(orders, max(1, _ENTRIES // len(b))):
        places = chunk.unsqueeze(2) * n + chunk.unsqueeze(1)
        sums.append(b.index_select(0, places.flatten()).view(len(chunk), -1) @ a)
    return torch.cat(sums)


def _number(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    if isinstance(value, int | float):
        return torch.tensor(value, dtype=torch.float64)
    got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"`measure` must give a number or a tensor (), got {got}.")


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
