"""Image-text alignment over a stream of image-text pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from matent_callbacks.accumulate.reduction import all_reduce_sequence_means
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    stage_mean,
)
from matent_callbacks.functional._tokens import check_stage
from matent_callbacks.functional.alignment import STAGES, image_reduction_ratio, image_text_alignment
from matent_callbacks.metrics._base import MergedMetric

BASES = ("effective_rank", "entropy")

HiddenStates = Tensor | tuple[Tensor, Tensor | None]


class ImageTextAlignment(MergedMetric):
    r"""Alignment of image and text inside a language model, over all pairs seen, between 1/3 and 1.

    :math:`\mathrm{mean}(e_3, e_4, e_5) / \max(e_3, e_4, e_5)`, with e3, e4, e5 the effective rank of the image alone,
    the text alone, and both together after the language model (Wei et al., arXiv 2401.17139; NeurIPS 2024 as
    "Diff-eRank"). Each is exp of the mean entropy over the samples, as everywhere for a data set.

    Args:
        basis: What e3, e4, e5 are: ``"effective_rank"`` (the NeurIPS version) or ``"entropy"`` (the first version).
        dtype: Of the statistics, float32 or float64.
        **kwargs: For :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If hidden states are not floating point.

    Shapes:
        ``update(image=..., text=..., image_text=...)``, each ``(B, T, d)``, or a pair of that and its mask ``(B, T)``;
        T and d may differ. ``compute()``: ``()``; NaN while nothing was seen.

    Example:
        >>> import torch
        >>> from matent_callbacks import ImageTextAlignment
        >>> metric = ImageTextAlignment()
        >>> both = torch.eye(4).unsqueeze(0)
        >>> metric.update(image=both, text=both, image_text=both)
        >>> round(metric.compute().item(), 4)
        1.0
    """

    plot_upper_bound = 1.0
    higher_is_better = True

    num_sequences: Tensor
    num_nonfinite: Tensor
    mean: Tensor
    _state_type = SequenceMean
    _counters = ("num_sequences", "num_nonfinite")

    def __init__(
        self,
        *,
        basis: Literal["effective_rank", "entropy"] = "effective_rank",
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        if basis not in BASES:
            raise ValueError(f"`basis` must be one of {BASES}, got {basis!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        super().__init__(**kwargs)
        self.basis = basis
        # One entry a stage, in the order of STAGES.
        self._add_states(_stacked([empty_sequence_mean(dtype=dtype)] * len(STAGES)))

    def update(
        self,
        *,
        image: HiddenStates,
        text: HiddenStates,
        image_text: HiddenStates,
        vision_encoder: HiddenStates | None = None,
        connector: HiddenStates | None = None,
    ) -> None:
        """Add pairs.

        Args:
            image: The image alone after the language model, ``(B, T, d)`` or ``((B, T, d), mask (B, T))``.
            text: The text alone after the language model.
            image_text: Both together after the language model.
            vision_encoder: The image after the vision encoder, for :meth:`summary`.
            connector: The image after the connector, for :meth:`summary`.

        Raises:
            TypeError: If hidden states are not floating point.
            ValueError: If a shape is wrong.
        """
        given = {
            "vision_encoder": vision_encoder,
            "connector": connector,
            "image": image,
            "text": text,
            "image_text": image_text,
        }
        self._join(_stacked([self._of_stage(name, given[name]) for name in STAGES]))

    def compute(self) -> Tensor:
        """Alignment of everything seen, ``()``."""
        readings = self._readings(self.basis)
        return image_text_alignment(readings["image"], readings["text"], readings["image_text"])

    def summary(self) -> dict[str, Tensor]:
        """All that was measured, ``()`` each, on this rank: the alignment, the image reduction ratio, and the readings.

        Returns:
            ``image_text``, ``image_reduction_ratio``, and ``effective_rank/<stage>`` and ``matrix_entropy/<stage>`` of
            ``vision_encoder``, ``connector``, ``image``, ``text`` and ``image_text``; NaN where nothing was given.
        """
        e = self._readings(self.basis)
        return {
            "image_text": image_text_alignment(e["image"], e["text"], e["image_text"]),
            "image_reduction_ratio": image_reduction_ratio(e["vision_encoder"], e["connector"]),
            **{f"effective_rank/{name}": value for name, value in self._readings("effective_rank").items()},
            **{f"matrix_entropy/{name}": value for name, value in self._readings("entropy").items()},
        }

    def _readings(self, basis: str) -> dict[str, Tensor]:
        entropy = torch.where(self.num_sequences > 0, self.mean, torch.nan)
        return dict(zip(STAGES, entropy if basis == "entropy" else entropy.exp(), strict=True))

    def _of_stage(self, name: str, given: HiddenStates | None) -> SequenceMean:
        if given is None:
            return empty_sequence_mean(dtype=self.mean.dtype, device=self.mean.device)
        hidden_states, mask = given if isinstance(given, tuple) else (given, None)
        return stage_mean(*check_stage(name, hidden_states, mask), dtype=self.mean.dtype)

    def _join(self, other: SequenceMean) -> None:
        self._state = merge_sequence_means(self._state, other)

    def _all_reduce(self, group: Any) -> None:
        (self._state,) = all_reduce_sequence_means([self._state], group)


def _stacked(means: list[SequenceMean]) -> SequenceMean:
    return SequenceMean(*(torch.stack(parts) for parts in zip(*means, strict=True)))
