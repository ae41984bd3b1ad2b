"""The paper's ratios: how the effective ranks of image, text and both relate."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._rows import common_dtype

STAGES = ("vision_encoder", "connector", "image", "text", "image_text")
"""Where the paper reads an image-text pair, e1 to e5."""
TOWERS = ("image_tower", "text_tower")
"""Where a dual encoder is read."""


def image_reduction_ratio(e1: float | Tensor, e2: float | Tensor) -> Tensor:
    r"""Share of the image's effective rank that the connector of a vision-language model removes.

    :math:`(e_1 - e_2) / e_1` (Wei et al., arXiv 2401.17139: effective ranks in "Diff-eRank", NeurIPS 2024, entropies
    in its first version).

    Args:
        e1: ``()`` or ``(B,)``, or a number: effective rank or entropy of the image after the vision encoder.
        e2: The same after the connector. A number or ``()`` is broadcast to ``(B,)``.

    Returns:
        ``()`` or ``(B,)``, at most 1; negative where the connector adds. NaN where ``e1`` is not above 0.

    Raises:
        TypeError: If an argument is neither a number nor a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> from matent_callbacks.functional import image_reduction_ratio
        >>> image_reduction_ratio(40.0, 10.0)
        tensor(0.7500)
    """
    before, after = _quantities(e1=e1, e2=e2)
    return torch.where(before > 0, (before - after) / before, torch.nan)


def image_text_alignment(e3: float | Tensor, e4: float | Tensor, e5: float | Tensor) -> Tensor:
    r"""How close the effective ranks of image, text and both together are inside the language model.

    :math:`\mathrm{mean}(e_3, e_4, e_5) / \max(e_3, e_4, e_5)` (Wei et al., arXiv 2401.17139: effective ranks in
    "Diff-eRank", NeurIPS 2024, entropies in its first version).

    Args:
        e3: ``()`` or ``(B,)``, or a number: effective rank or entropy of the image alone after the language model.
        e4: The same of the text alone.
        e5: The same of image and text together. Numbers and ``()`` are broadcast to ``(B,)``.

    Returns:
        ``()`` or ``(B,)``, between 1/3 (two of the three are 0) and 1 (all are equal). NaN where all are 0.

    Raises:
        TypeError: If an argument is neither a number nor a floating point tensor.
        ValueError: If a shape is wrong.

    Example:
        >>> from matent_callbacks.functional import image_text_alignment
        >>> image_text_alignment(30.0, 20.0, 40.0)
        tensor(0.7500)
    """
    image, text, both = _quantities(e3=e3, e4=e4, e5=e5)
    return (image + text + both) / 3 / torch.maximum(torch.maximum(image, text), both)


def _quantities(**quantities: float | Tensor) -> list[Tensor]:
    """Return all as tensors of one dtype that broadcast, or raise naming the argument."""
    tensors: dict[str, Tensor] = {}
    for name, value in quantities.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif not isinstance(value, int | float):
            raise TypeError(f"`{name}` must be a number or a floating point tensor, got {type(value).__name__}.")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(f"`{name}` must be a number or a floating point tensor, got {value.dtype}.")
        if value.ndim > 1:
            raise ValueError(f"`{name}` must have shape () or (B,), got {tuple(value.shape)}.")
    batched = {name: value.shape for name, value in tensors.items() if value.ndim == 1}
    for name, shape in batched.items():
        first = next(iter(batched))
        if shape != batched[first]:
            raise ValueError(f"`{name}` must have the shape of `{first}`, {tuple(batched[first])}, got {tuple(shape)}.")
    like = next(iter(tensors.values()), torch.empty(()))
    dtype = common_dtype(*tensors.values()) if tensors else statistics_dtype(like)
    return [torch.as_tensor(value, dtype=dtype, device=like.device) for value in quantities.values()]
