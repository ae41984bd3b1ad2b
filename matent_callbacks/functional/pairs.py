"""Measures of paired rows: how two representations of the same things relate."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._rows import centred_features, paired_rows, prepared
from matent_callbacks.functional.entropy import check_alpha, entropy_of_matrix


def matrix_mutual_information(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Matrix-based mutual information of paired rows, in nats.

    :math:`I_\alpha = S_\alpha(A) + S_\alpha(B) - S_\alpha(A \circ B / \mathrm{tr}(A \circ B))` (Giraldo, Rao &
    Principe, arXiv 1211.2459; on representations Skean et al., arXiv 2301.08164). A and B are the Gram matrices of the
    centred rows scaled to unit length, divided by n; :math:`\circ` is the entrywise product, and
    :math:`n\, A \circ B` has the non-zero eigenvalues of :math:`\frac{1}{n} \sum_i x_i x_i^\top \otimes y_i y_i^\top`.

    The definition needs a constant diagonal. A row that equals the mean has no direction to scale, so all such rows
    share one direction of their own, orthogonal to all others (if rounding leaves them any direction, that one counts).
    Without such rows :math:`S_\alpha(A)` is :func:`matrix_entropy` of ``x``.

    ``n A o B`` is a separable state with the marginals of A and B, hence

    * :math:`I_\alpha \le \min(S_\alpha(A), S_\alpha(B))` for every order (Bapat & Sunder 1985), and ``x`` with
      itself stays below, at order 1, unless its directions are all parallel or orthogonal;
    * :math:`I_1 \ge 0`, by the subadditivity of the von Neumann entropy. Rényi entropies of other orders are not
      subadditive, and :math:`I_\alpha` **can be negative**. Nothing is clamped, so rounding shows below 0 as well;
    * :math:`I_\alpha \ge S_\alpha(A) + S_\alpha(B) - \log n` for *any* pairs. Randomly permuted pairs have an expected
      :math:`I_1` of up to :math:`\log(1 + (r_x - 1)(r_y - 1) / (n - 1))`, with r the ranks of A and B: far from 0
      unless n exceeds their product. Compare with the value of permuted pairs.

    Args:
        x: ``(n, d1)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d2)``. Pairs with NaN or Inf on either side are left out.
        alpha: Order of the entropies, above 0. An order of 2 needs no decomposition; others take ``O(n^3)`` at most.

    Returns:
        ``()``; 0 if either side is constant, NaN for fewer than two pairs.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor.
        ValueError: If a shape is wrong or ``alpha`` is not above 0.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import matrix_mutual_information
        >>> x = torch.cat([torch.eye(4), -torch.eye(4)])
        >>> round(matrix_mutual_information(x, x).item(), 4)  # four orthogonal directions: log 4
        1.3863
    """
    check_alpha(alpha)
    x, y = paired_rows(x, y)
    if len(x) < 2:
        return x.new_full((), torch.nan)
    with full_precision(x.device):
        a, b = _directions(x), _directions(y)
        information: Tensor = _entropy(a, alpha=alpha) + _entropy(b, alpha=alpha) - _entropy(a, b, alpha=alpha)
    return information


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear centred kernel alignment of paired rows.

    :math:`\lVert Y_c^\top X_c \rVert_F^2 / (\lVert X_c^\top X_c \rVert_F \lVert Y_c^\top Y_c \rVert_F)` of the centred
    features (Kornblith et al. 2019, arXiv 1905.00414), from ``n x n`` or from ``d x d`` products, whichever is
    cheaper. Orthogonal maps, isotropic scaling and shifts of either side change nothing.

    Randomly permuted pairs have the expectation :math:`\sqrt{p_x p_y} / (n - 1)` with p the participation ratios of
    the two covariances: close to 0 only if n is much larger.

    Args:
        x: ``(n, d1)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d2)``. Pairs with NaN or Inf on either side are left out.

    Returns:
        ``()``, between 0 and 1; rounding beyond is clamped. NaN for fewer than two pairs or a constant side.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import linear_cka
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> linear_cka(x, x[:, :1])  # one of two equal directions: 1 / sqrt(2)
        tensor(0.7071)
    """
    x, y = paired_rows(x, y)
    if len(x) < 2:
        return x.new_full((), torch.nan)
    with full_precision(x.device):
        x, y = centred_features(x), centred_features(y)
        n, d1, d2 = len(x), x.shape[1], y.shape[1]
        if n * (d1 + d2) < d1 * d1 + d1 * d2 + d2 * d2:
            gram_x, gram_y = x @ x.T, y @ y.T
            shared = (gram_x * gram_y).sum()
        else:
            gram_x, gram_y = x.T @ x, y.T @ y
            shared = (y.T @ x).square().sum()
        # Sums are pairwise, torch.linalg.matrix_norm is not: it costs float32 two digits here.
        norms = gram_x.square().sum().sqrt() * gram_y.square().sum().sqrt()
        return (shared / norms).clamp(min=0, max=1)


def debiased_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear CKA without its bias: about 0 for unrelated rows, whatever the numbers of rows and features.

    :math:`\mathrm{HSIC}_1(K, L) / \sqrt{\mathrm{HSIC}_1(K, K)\, \mathrm{HSIC}_1(L, L)}` of the Gram matrices K and L,
    with the unbiased estimator of Song et al. 2012 (JMLR 13, 1393-1434), as Nguyen et al. 2021 (arXiv 2010.15327) use
    it. :math:`\mathrm{HSIC}_1(K, L) = \sum_{ij} A_{ij} B_{ij} / (n (n - 3))`, with A and B the Gram matrices U-centred
    (Székely & Rizzo 2014): for each, :math:`A_{ij} = K_{ij} - K_{i.} / (n - 2) - K_{.j} / (n - 2) + K_{..} / ((n - 1)
    (n - 2))` with the sums of K without its diagonal, and 0 on the diagonal.

    Its mean over all pairings of given rows is 0, and that over independent draws, too. Orthogonal maps, isotropic
    scaling and shifts of either side change nothing.

    Args:
        x: ``(n, d1)`` with n of at least 4, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d2)``. Pairs with NaN or Inf on either side are left out.

    Returns:
        ``()``, between -1 and 1: 1 for the same rows up to these maps, negative where pairs agree less than chance.
        NaN where fewer than 4 pairs are left, and for a side that is constant or whose rows are all equally far from
        each other.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor.
        ValueError: If a shape is wrong or there are fewer than 4 pairs.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import debiased_cka, linear_cka
        >>> x, y = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))  # unrelated
        >>> linear_cka(x, y) > 0.9, abs(debiased_cka(x, y)) < 0.2
        (tensor(True), tensor(True))
    """
    paired_x, paired_y = paired_rows(x, y)
    if len(x) < 4:
        raise ValueError(f"`x` must have at least 4 rows, got {len(x)}.")
    if len(paired_x) < 4:
        return paired_x.new_full((), torch.nan)
    with full_precision(x.device):
        return similarity(unbiased_gram(paired_x), unbiased_gram(paired_y))


def mutual_knn(x: Tensor, y: Tensor, *, k: int = 10) -> Tensor:
    r"""Mean share of the k nearest neighbours that paired rows have in common.

    :math:`\frac{1}{nk} \sum_i \lvert N_k(x_i) \cap N_k(y_i) \rvert`, neighbours by cosine similarity without the row
    itself (Huh et al. 2024, "The Platonic Representation Hypothesis", arXiv 2405.07987). A zero row has similarity 0
    to all; which of equally similar rows are nearest is left to :func:`torch.topk`. Randomly permuted pairs have the
    expectation :math:`k / (n - 1)`.

    Args:
        x: ``(n, d1)`` with n above k, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d2)``. Pairs with NaN or Inf on either side are left out.
        k: Number of neighbours, at least 1.

    Returns:
        ``()``, between 0 and 1; NaN where fewer than ``k + 1`` pairs are left.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor or ``k`` not an int.
        ValueError: If a shape is wrong, ``k`` is below 1 or there are not more than ``k`` pairs.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import mutual_knn
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> mutual_knn(x, x.flip(1), k=1), mutual_knn(x, x[[0, 2, 1, 3]], k=1)
        (tensor(1.), tensor(0.))
    """
    if not isinstance(k, int):
        raise TypeError(f"`k` must be an int, got {type(k).__name__}.")
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    paired_x, paired_y = paired_rows(x, y)
    if len(x) <= k:
        raise ValueError(f"`x` must have at least k + 1 = {k + 1} rows, got {len(x)}.")
    if len(paired_x) <= k:
        return paired_x.new_full((), torch.nan)
    with full_precision(x.device):
        shared = (is_neighbour(paired_x, k) & is_neighbour(paired_y, k)).sum()
    return shared.to(paired_x.dtype) / (len(paired_x) * k)


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    r"""Distance between the mean directions of two modalities in a shared space.

    :math:`\lVert \frac{1}{n} \sum_i x_i / \lVert x_i \rVert_2 - \frac{1}{n} \sum_i y_i / \lVert y_i \rVert_2
    \rVert_2` (Liang et al. 2022, "Mind the Gap", arXiv 2203.02053). A zero row stays zero. It does not depend on which
    row is paired with which.

    Args:
        x: ``(n, d)``, one row per pair. float64 is computed in float64, all else in float32.
        y: ``(n, d)``. Pairs with NaN or Inf on either side are left out.

    Returns:
        ``()``, between 0 and 2; NaN for fewer than two pairs.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import modality_gap
        >>> x = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
        >>> modality_gap(x, -x)
        tensor(2.)
    """
    paired_x, paired_y = paired_rows(x, y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"`y` must have as many features as `x`, {x.shape[1]}, got {y.shape[1]}.")
    if len(paired_x) < 2:
        return paired_x.new_full((), torch.nan)
    with full_precision(x.device):
        means = (prepared(rows, center=False, normalize=True).mean(0) for rows in (paired_x, paired_y))
        gap: Tensor = torch.linalg.vector_norm(next(means) - next(means))
    return gap


def _directions(rows: Tensor) -> Tensor:
    """Centred rows of unit length, ``(n, d + 1)``: the last feature is the direction of rows that have none."""
    directions = prepared(rows, center=True, normalize=True)
    undirected = torch.linalg.vector_norm(directions, dim=-1, keepdim=True) < 0.5
    return torch.cat([directions, undirected.to(directions.dtype)], dim=-1)


def _entropy(*sides: Tensor, alpha: float) -> Tensor:
    """Entropy of the entrywise product of the Gram matrices of the sides, ``(n, d)`` each."""
    n = len(sides[0])
    if math.prod(side.shape[1] for side in sides) < n:
        # The product is the Gram matrix of tensor-product features: if these are few, their covariance is smaller.
        features = reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(1), sides)
        return entropy_of_matrix(features.T @ features, alpha=alpha)
    return entropy_of_matrix(reduce(torch.mul, (side @ side.T for side in sides)), alpha=alpha)


def centred_gram(rows: Tensor) -> Tensor:
    """Gram matrix ``(n, n)`` of the centred rows, up to scale; the entrywise product of both sides' sums to the CKA."""
    features = centred_features(rows)
    return features @ features.T


def unbiased_gram(rows: Tensor) -> Tensor:
    """U-centred Gram matrix ``(n, n)``, up to scale; the entrywise product of both sides' sums to the debiased CKA."""
    return u_centred(centred_gram(rows))


def u_centred(gram: Tensor, counts: Tensor | None = None) -> Tensor:
    """U-centre the Gram matrix ``(n, n)`` of centred rows (Székely & Rizzo 2014): zero diagonal, rows that add up to 0.

    The entrywise product of both sides' matrices sums to the unbiased HSIC. Rows that do not count are zero in the Gram
    matrix and the result.
    """
    if counts is None:
        counts = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    n = counts.sum().to(gram.dtype)
    # Rows that are equally far from each other have no structure: what is left of them is rounding error.
    rounding = 4 * n * torch.finfo(gram.dtype).eps * gram.diagonal().amax()
    off_diagonal = (counts.unsqueeze(1) & counts).fill_diagonal_(False).to(gram.dtype)
    gram = gram * off_diagonal
    means = gram.sum(1) / (n - 2)
    gram = (gram - means.unsqueeze(1) - means + means.sum() / (n - 1)) * off_diagonal
    return torch.where(gram.square().sum().sqrt() > rounding, gram, 0.0)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine ``()`` between two matrices."""
    norms = a.square().sum().sqrt() * b.square().sum().sqrt()
    return ((a * b).sum() / norms).clamp(min=-1, max=1)


def is_neighbour(rows: Tensor, k: int) -> Tensor:
    """``(n, n)`` bool: the k most similar others of each row."""
    directions = prepared(rows, center=False, normalize=True)
    nearest = (directions @ directions.T).fill_diagonal_(-torch.inf).topk(k, dim=-1).indices
    return torch.zeros(len(rows), len(rows), dtype=torch.bool, device=rows.device).scatter_(1, nearest, True)
