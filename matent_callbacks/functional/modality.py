"""How far apart the tokens of two modalities lie in the layers of a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._rows import common_dtype
from matent_callbacks.functional._tokens import finite_rows

_SIGMAS = 3.0


def modality_integration_rate(image: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
    r"""Modality integration rate (MIR) of image and text tokens in the layers of a language model; lower: closer.

    :math:`\log_{10} \sum_l D_l` with :func:`modality_distance` :math:`D_l` of layer l (Huang et al., ICCV 2025,
    arXiv 2410.07167). In the paper these are all layers after the embeddings.

    Args:
        image: ``(n, d)`` for each layer: the image tokens of all samples.
        text: ``(m, d)`` for each layer: the text tokens of all samples.

    Returns:
        ``()``; NaN where fewer than two tokens of either are finite.

    Raises:
        TypeError: If one of the tensors is not a floating point tensor.
        ValueError: If a shape is wrong, there is no layer, or there are not as many of ``text`` as of ``image``.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import modality_integration_rate
        >>> tokens = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> round(modality_integration_rate([tokens[0] + 100], [tokens[1]]).item(), 1)  # far apart
        4.0
    """
    if not len(image) or len(image) != len(text):
        raise ValueError(
            f"`image` and `text` must hold a tensor for each layer, one at least, got {len(image)} and {len(text)}."
        )
    distances = [modality_distance(own, others) for own, others in zip(image, text, strict=True)]
    return torch.stack(distances).sum().log10()


def modality_distance(image: Tensor, text: Tensor) -> Tensor:
    r"""Distance of the image tokens of a layer from its text tokens, the summand of the modality integration rate.

    Both are divided by the mean length of the text tokens. Tokens whose length is over three standard deviations from
    the mean of their modality are scaled to its median length. Then :func:`frechet_distance` (Huang et al., ICCV 2025,
    arXiv 2410.07167; the authors' code takes the distance from the median, and puts the median vector in place).

    Args:
        image: ``(n, d)``. float64 is computed in float64, all else in float32. Tokens with NaN or Inf are left out.
        text: ``(m, d)``.

    Returns:
        ``()``; NaN where fewer than two tokens of either are finite.

    Raises:
        TypeError: If an argument is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import modality_distance
        >>> modality_distance(torch.tensor([[3.0], [3.0]]), torch.tensor([[1.0], [1.0]]))  # (3 - 1)^2
        tensor(4.)
    """
    image, text = _two_sets(image=image, text=text)
    scale = torch.linalg.vector_norm(text, dim=-1).mean()
    return _frechet(*(_without_outliers(rows / torch.where(scale > 0, scale, 1.0)) for rows in (image, text)))


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Fréchet distance of the normal distributions with the means and covariances of two sets of rows.

    :math:`\lVert \mu_x - \mu_y \rVert^2 + \mathrm{tr}\, A + \mathrm{tr}\, B - 2\, \mathrm{tr} (A B)^{1/2}` (Dowson &
    Landau 1982), with A and B the unbiased covariances. :math:`\mathrm{tr} (A B)^{1/2}` is the sum of the singular
    values of :math:`X_c Y_c^\top / \sqrt{(n - 1) (m - 1)}`: no square root of a matrix that may be singular is taken.

    Args:
        x: ``(n, d)``. float64 is computed in float64, all else in float32. Rows with NaN or Inf are left out.
        y: ``(m, d)``.

    Returns:
        ``()``, not negative; NaN where fewer than two rows of either are finite.

    Raises:
        TypeError: If an argument is not a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> import torch
        >>> from matent_callbacks.functional import frechet_distance
        >>> x = torch.tensor([[-1.0], [1.0]])  # mean 0, variance 2
        >>> round(frechet_distance(x, 2 * x + 3).item(), 4)  # mean 3, twice the standard deviation: 3^2 + 2
        11.0
    """
    return _frechet(*_two_sets(x=x, y=y))


def _two_sets(**sets: Tensor) -> list[Tensor]:
    """Return the finite rows of both in the dtype to compute in, or raise naming the argument."""
    for name, rows in sets.items():
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            what = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"`{name}` must be a floating point tensor, got {what}.")
        if rows.ndim != 2 or not rows.shape[1]:
            raise ValueError(f"`{name}` must have shape (tokens, features), got {tuple(rows.shape)}.")
    (first, rows), (second, others) = sets.items()
    if rows.shape[1] != others.shape[1]:
        raise ValueError(f"`{second}` must have as many features as `{first}`, {rows.shape[1]}, got {others.shape[1]}.")
    wide = [each.to(common_dtype(rows, others)) for each in (rows, others)]
    return [each[finite_rows(each)] for each in wide]


def _without_outliers(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=-1)
    if len(rows) < 2:
        return rows
    is_outlier = (norms - norms.mean()).abs() > _SIGMAS * norms.std()
    # An outlier may be a zero, which has no direction.
    factor = torch.where(is_outlier & (norms > 0), norms.median() / norms, 1.0)
    return rows * factor.unsqueeze(-1)


def _frechet(x: Tensor, y: Tensor) -> Tensor:
    if min(len(x), len(y)) < 2:
        return x.new_full((), torch.nan)
    with full_precision(x.device):
        means = [rows.mean(0) for rows in (x, y)]
        # So scaled, the product of one with its own transpose is the covariance.
        roots = [(rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip((x, y), means, strict=True)]
        spread = sum(root.square().sum() for root in roots)
        small = [torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root for root in roots]
        shared = torch.linalg.svdvals(small[0] @ small[1].T).sum()
        distance: Tensor = (means[0] - means[1]).square().sum() + spread - 2 * shared
        return distance.clamp(min=0)
