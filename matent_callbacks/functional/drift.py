"""How far the hidden states of the same tokens have moved: principal directions, and the tokens' own directions."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._rows import centred_features, paired_rows, prepared
from matent_callbacks.functional._tokens import finite_rows
from matent_callbacks.functional.pairs import similarity, u_centred

_DIRECTIONS = 16


def subspace_overlap(x: Tensor, y: Tensor, *, directions: int = _DIRECTIONS) -> Tensor:
    r"""Share of the strongest principal directions that two representations of the same things have in common.

    :math:`\lVert U^\top V \rVert_F^2 / k`, with the orthonormal U and V ``(d, k)`` the k strongest principal
    directions of the centred rows of either side: the mean squared cosine of the principal angles between both
    subspaces (Björck & Golub 1973, Math. Comp. 27, 579-594; between fine-tuned weights Hu et al. 2022, LoRA, arXiv
    2106.09685, section 7). Two random subspaces of :math:`R^d` have the expectation k / d.

    k is ``directions``, or fewer where fewer have any variance on both sides: the larger of both ranks. If one side has
    a smaller rank than the other, the directions that it lacks count as not shared.

    Args:
        x: ``(n, d)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d)``. Pairs with NaN or Inf on either side are left out.
        directions: How many directions, at least 1.

    Returns:
        ``()``, between 0 and 1. NaN for fewer than two pairs, or where both sides are constant.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor or ``directions`` not an int.
        ValueError: If a shape is wrong, widths differ, or ``directions`` is below 1.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import subspace_overlap
        >>> x = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
        >>> subspace_overlap(x, x[:, [0, 2, 1]])  # two planes that share one line
        tensor(0.5000)
    """
    if isinstance(directions, bool) or not isinstance(directions, int):
        raise TypeError(f"`directions` must be an int, got {type(directions).__name__}.")
    if directions < 1:
        raise ValueError(f"`directions` must be at least 1, got {directions}.")
    x, y = _of_one_width(x, y)
    with full_precision(x.device):
        features = centred_features(x), centred_features(y)
        return _overlap(features, [_product(side, side) for side in features], directions)


def token_cosine(x: Tensor, y: Tensor) -> Tensor:
    r"""Mean cosine between paired rows, as they are.

    :math:`\frac{1}{n} \sum_i x_i \cdot y_i / (\lVert x_i \rVert \lVert y_i \rVert)` over the pairs of which neither
    row is zero. Nothing is centred, so a mean that all rows share holds it near 1; a rotation of one side lowers it,
    and does not change :func:`debiased_cka`.

    Args:
        x: ``(n, d)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d)``. Pairs with NaN or Inf on either side are left out.

    Returns:
        ``()``, between -1 and 1; NaN where no pair is left.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor.
        ValueError: If a shape is wrong, or widths differ.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import token_cosine
        >>> x = torch.eye(2)
        >>> token_cosine(x, x), token_cosine(x, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        (tensor(1.), tensor(0.5000))
    """
    x, y = _of_one_width(x, y)
    with full_precision(x.device):
        return _mean_cosine(x, y, torch.ones(len(x), dtype=torch.bool, device=x.device))


def compare_tokens(x: Tensor, y: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Compute what moved between the tokens ``(n, d)`` of a reference and those of now, in one go.

    Whatever ``counts`` ``(n,)`` says, nothing is read on the host: a token that does not count is a row of zeros.

    Returns:
        ``drift``, 1 - :func:`debiased_cka`; ``subspace_overlap`` and ``token_cosine``; NaN where too few tokens count.
        And ``count``: how many do.
    """
    if x.device.type == "mps":  # which has neither float64 nor the solver
        x, y, counts = x.cpu(), y.cpu(), counts.cpu()
    counts = counts & finite_rows(x) & finite_rows(y)
    features = [centred_features(side, counts) for side in (x, y)]
    n, (most, width) = counts.sum(), x.shape
    # Of many tokens the products of features are smaller. In float64, as the diagonal of the Gram matrix, which is to
    # be left out, is subtracted, and one long token may be most of it.
    if most > width:
        features = [side.double() for side in features]
    products = [_product(side, side) for side in features]
    if most > width:
        shared = (features[0].T @ features[1]).square().sum()
        lengths = [side.square().sum(1) for side in features]
        cka = _debiased([product.square().sum() for product in products], shared, lengths, n.double())
    else:
        cka = similarity(*(u_centred(product, counts) for product in products))
    cka = torch.where(n >= _FEWEST, cka, torch.nan)
    products, features = [[side.to(x.dtype) for side in sides] for sides in (products, features)]
    return {
        "drift": 1 - cka,
        "subspace_overlap": _overlap(features, products, _DIRECTIONS),
        "token_cosine": _mean_cosine(x, y, counts),
        "count": n,
    }


_FEWEST = 4
"""Tokens that the unbiased HSIC takes."""


def _of_one_width(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape[-1:] != y.shape[-1:]:
        raise ValueError(f"`y` must have as many features as `x`, {tuple(x.shape)}, got {tuple(y.shape)}.")
    return paired_rows(x, y)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The smaller of ``(n, n)`` and ``(d, d)``; the non-zero eigenvalues of a side with itself are the same."""
    return x.T @ y if len(x) > x.shape[1] else x @ y.T


def _debiased(own: list[Tensor], shared: Tensor, lengths: list[Tensor], n: Tensor) -> Tensor:
    r"""Debiased CKA from sums: the squared norms of ``X^T X``, ``Y^T Y`` and ``X^T Y``, and the rows' squared lengths.

    With the rows centred, each row of a Gram matrix without its diagonal sums to minus its diagonal, so the unbiased
    HSIC, :math:`tr(K L) + 1^T K 1\, 1^T L 1 / ((n - 1) (n - 2)) - 2 / (n - 2)\, 1^T K L 1`, takes no Gram matrix.
    """

    def hsic(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return total - (a * b).sum() * (1 + 2 / (n - 2)) + a.sum() * b.sum() / ((n - 1) * (n - 2))

    a, b = lengths
    norms = hsic(own[0], a, a).clamp(min=0).sqrt() * hsic(own[1], b, b).clamp(min=0).sqrt()
    return (hsic(shared, a, b) / norms).clamp(min=-1, max=1)


def _overlap(features: list[Tensor] | tuple[Tensor, ...], products: list[Tensor], directions: int) -> Tensor:
    """Overlap of the principal directions of centred features ``(n, d)``, from the :func:`_product` of each side."""
    u, v = (_principal(*side, directions) for side in zip(features, products, strict=True))
    most = torch.maximum(u.square().sum(), v.square().sum()).round()
    return ((u.T @ v).square().sum() / most).clamp(max=1)


def _principal(features: Tensor, product: Tensor, directions: int) -> Tensor:
    """Orthonormal columns ``(d, k)``: the strongest directions, zeros beyond the rank."""
    eigenvalues, vectors = torch.linalg.eigh(product)
    eigenvalues, vectors = eigenvalues.flip(-1)[:directions], vectors.flip(-1)[:, :directions]
    if len(features) <= features.shape[1]:
        vectors = torch.linalg.qr(features.T @ vectors).Q
    noise = 4 * max(features.shape) ** 0.5 * torch.finfo(product.dtype).eps
    strongest: Tensor = vectors * (eigenvalues > noise * eigenvalues[0])
    return strongest


def _mean_cosine(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    directions = [prepared(side, center=False, normalize=True, counts=counts) for side in (x, y)]
    directed = (directions[0] != 0).any(1) & (directions[1] != 0).any(1)
    cosine: Tensor = (directions[0] * directions[1]).sum() / directed.sum()
    return cosine.clamp(min=-1, max=1)
