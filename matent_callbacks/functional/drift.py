"""How far the hidden states of the same tokens have moved: principal directions, and the tokens' own directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from matent_callbacks.functional._estimate import normal, spanned
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._rows import centred_features, paired_rows, prepared
from matent_callbacks.functional._tokens import finite_rows
from matent_callbacks.functional.pairs import similarity, u_centred

_DIRECTIONS = 16
# The strongest directions of a wide side are found in the space that products with a block of probes span, this many
# more than directions: their error is then that of rounding, unless many more directions are about as strong.
_MORE_PROBES, _PRODUCTS = 16, 10


def subspace_overlap(x: Tensor, y: Tensor, *, directions: int = _DIRECTIONS) -> Tensor:
    r"""Share of the strongest principal directions that two representations of the same things have in common.

    :math:`\lVert U^\top V \rVert_F^2 / k`, with the orthonormal U and V ``(d, k)`` the k strongest principal
    directions of the centred rows of either side: the mean squared cosine of the principal angles between both
    subspaces (Björck & Golub 1973, Math. Comp. 27, 579-594; between fine-tuned weights Hu et al. 2022, LoRA, arXiv
    2106.09685, section 7). Two random subspaces of :math:`R^d` have the expectation k / d.

    k is ``directions``, or fewer where fewer have any variance on both sides: the larger of both ranks. If one side has
    a smaller rank than the other, the directions that it lacks count as not shared.

    Large sides are not decomposed: their directions are found by ten products with a block of ``directions + 16``
    vectors (block Lanczos; Golub & Underwood 1977). Where the spectrum falls, that is right to rounding.

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
        features = [centred_features(side) for side in (x, y)]
        return _overlap(features, [_product(side) for side in features], directions)


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


_ALL = ("drift", "subspace_overlap", "token_cosine")


def compare_tokens(x: Tensor, y: Tensor, counts: Tensor, names: Iterable[str] = _ALL) -> dict[str, Tensor]:
    """Compute what moved between the tokens ``(n, d)`` of a reference and those of now, in one go.

    Whatever ``counts`` ``(n,)`` says, nothing is read on the host: a token that does not count is a row of zeros.

    Returns:
        Of these what ``names`` has: ``drift``, 1 - :func:`debiased_cka`; ``subspace_overlap`` and ``token_cosine``; NaN
        where too few tokens count. And ``count``: how many do.
    """
    if x.device.type == "mps":  # which has neither float64 nor the solver
        x, y, counts = x.cpu(), y.cpu(), counts.cpu()
    counts = counts & finite_rows(x) & finite_rows(y)
    found = {"count": counts.sum()}
    features, products = list[Tensor](), list[Tensor]()
    if not {"drift", "subspace_overlap"}.isdisjoint(names):
        features = [centred_features(side, counts) for side in (x, y)]
        # Of many tokens in float64, as the diagonal of the Gram matrix, which is to be left out, is subtracted from
        # what is computed of the features, and one long token may be most of it.
        many = len(x) > x.shape[1]
        products = [_product(side.double() if many else side) for side in features]
    for name in names:
        if name == "token_cosine":
            found[name] = _mean_cosine(x, y, counts)
        elif name == "subspace_overlap":
            found[name] = _overlap(features, [product.to(x.dtype) for product in products], _DIRECTIONS)
        else:
            found[name] = 1 - _cka(features, products, counts)
    return found


def _product(features: Tensor) -> Tensor:
    """The smaller of ``(n, n)`` and ``(d, d)``, whose non-zero eigenvalues are the same."""
    return features.T @ features if len(features) > features.shape[1] else features @ features.T


def _cka(features: Sequence[Tensor], products: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Debiased CKA of two sides, from the :func:`_product` of each; NaN where too few rows count."""
    n, (most, width) = counts.sum(), features[0].shape
    if most <= width:
        cka = similarity(*(u_centred(product, counts) for product in products))
    else:
        x, y = (side.double() for side in features)
        own, shared = [product.square().sum() for product in products], (x.T @ y).square().sum()
        cka = _debiased(own, shared, [side.square().sum(1) for side in (x, y)], n.double())
    return torch.where(n >= _FEWEST, cka, torch.nan)


_FEWEST = 4
"""Tokens that the unbiased HSIC takes."""


def _of_one_width(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape[-1:] != y.shape[-1:]:
        raise ValueError(f"`y` must have as many features as `x`, {tuple(x.shape)}, got {tuple(y.shape)}.")
    return paired_rows(x, y)


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


def _overlap(features: Sequence[Tensor], products: Sequence[Tensor], directions: int) -> Tensor:
    """Overlap of the principal directions of centred features ``(n, d)``, from the :func:`_product` of each side."""
    u, v = (_principal(*side, directions) for side in zip(features, products, strict=True))
    most = torch.maximum(u.square().sum(), v.square().sum()).round()
    return ((u.T @ v).square().sum() / most).clamp(max=1)


def _principal(features: Tensor, product: Tensor, directions: int) -> Tensor:
    """Orthonormal columns ``(d, k)``: the strongest directions, zeros beyond the rank."""
    probes = directions + _MORE_PROBES
    if 2 * _PRODUCTS * probes > len(product):
        eigenvalues, vectors = torch.linalg.eigh(product)
    else:
        basis, inside, _ = spanned(product.matmul, normal(len(product), probes, 0, product), _PRODUCTS)
        # Without any variance there are no products, and no basis.
        usable = torch.isfinite(inside).all()
        basis, inside = (torch.where(usable, found, 0.0) for found in (basis, inside))
        eigenvalues, vectors = torch.linalg.eigh(inside)
        vectors = basis @ vectors
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
