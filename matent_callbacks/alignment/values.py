"""Computes the values of image-text alignment from what was read, by the names that they are logged under."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from matent_callbacks.alignment.statistics import EXCHANGED, Counts, PairStatistics
from matent_callbacks.functional.alignment import image_reduction_ratio, image_text_alignment
from matent_callbacks.functional.chance import pairing_z_score
from matent_callbacks.functional.pairs import (
    debiased_cka,
    linear_cka,
    matrix_mutual_information,
    modality_gap,
    mutual_knn,
)

VECTOR_MEASURES = ("cka", "mutual_knn", "mutual_information", "modality_gap", "cka_debiased", "cka_z", "mutual_knn_z")
"""Computed from one vector for the image and one for the text of each pair."""
EXCHANGE_MEASURES = ("grounding", "image_text_shift")
"""Of vision-language models only: pairs compared with exchanged images."""
LAYER_MEASURES = ("mir", "mir_by_layer")
"""Of vision-language models only, on request: image and text tokens compared in all layers of the language model."""
PAIR_MEASURES = (*VECTOR_MEASURES, *EXCHANGE_MEASURES, *LAYER_MEASURES)
OF_VISION_LANGUAGE_MODELS = ("cka_debiased", "cka_z", "mutual_knn", "mutual_knn_z", *EXCHANGE_MEASURES)
OF_DUAL_ENCODERS = VECTOR_MEASURES
SUMMARIZED_BY_MAXIMUM = ("alignment/image_text", *(f"alignment/{name}" for name in OF_VISION_LANGUAGE_MODELS))
"""The keys whose maximum over the run belongs in a run's summary, beside their last value."""


class AlignmentValues:
    """Which values are computed, as the arguments of ``measure_alignment`` say."""

    def __init__(
        self,
        *,
        basis: str,
        metrics: str | Iterable[str],
        pair_measures: Iterable[str] | None,
        k: int,
        alpha: float,
    ) -> None:
        self._basis = basis
        self._metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        self._pair_measures = None if pair_measures is None else tuple(pair_measures)
        self._k = k
        self._alpha = alpha
        _check_names("`basis`", (basis,), ("effective_rank", "entropy"))
        _check_names("`metrics`", self._metrics, ("effective_rank", "matrix_entropy"))
        _check_names("`pair_measures`", self._pair_measures or (), PAIR_MEASURES)

    def measures(self, *, dual_encoder: bool) -> tuple[str, ...]:
        """Return the measures of pairs for this kind of model; ValueError for one that it cannot have."""
        if dual_encoder:
            _check_names("`pair_measures` of a dual encoder", self._pair_measures or (), OF_DUAL_ENCODERS)
        if self._pair_measures is not None:
            return self._pair_measures
        return OF_DUAL_ENCODERS if dual_encoder else OF_VISION_LANGUAGE_MODELS

    @property
    def needs_exchange(self) -> bool:
        """Whether a vision-language model is to be read with exchanged images, too."""
        return not set(EXCHANGE_MEASURES).isdisjoint(self.measures(dual_encoder=False))

    @property
    def needs_layers(self) -> bool:
        """Whether a vision-language model is to be read in all layers of its language model."""
        return not set(LAYER_MEASURES).isdisjoint(self._pair_measures or ())

    def compute(
        self, statistics: PairStatistics, distances: Mapping[str, Tensor], warn_once: Callable[[str, str], None]
    ) -> dict[str, float]:
        """Compute all values; those that are NaN are left out.

        Args:
            statistics: What was read, on all ranks.
            distances: How far image and text are apart in each layer, where that is asked for.
            warn_once: Takes a subject and a message.

        Raises:
            ValueError: If the probe holds too few pairs for what was asked for.
        """
        entropy = {
            name: torch.where(m.num_sequences > 0, m.mean, torch.nan) for name, m in statistics.entropies.items()
        }
        effective_rank = {name: value.exp() for name, value in entropy.items()}
        e = entropy if self._basis == "entropy" else effective_rank
        dual_encoder = "image_text" not in e
        measures = self.measures(dual_encoder=dual_encoder)
        values: dict[str, Tensor] = {}
        if not dual_encoder:
            values["alignment/image_text"] = image_text_alignment(e["image"], e["text"], e["image_text"])
            values["alignment/image_reduction_ratio"] = image_reduction_ratio(e["vision_encoder"], e["connector"])
        for metric in self._metrics:
            of_stages = entropy if metric == "matrix_entropy" else effective_rank
            values |= {f"{metric}/{stage}": value for stage, value in of_stages.items() if stage not in EXCHANGED}
        pairs: dict[str, Tensor] = {}
        if EXCHANGED[0] in e:
            pairs |= _exchange_measures(statistics.counts, e, measures, warn_once)
        pairs |= self._vector_measures(statistics.image, statistics.text, measures, warn_once)
        if distances and "mir" in measures:
            pairs["mir"] = torch.stack(list(distances.values())).sum().log10()
        if "mir_by_layer" in measures:
            pairs |= {f"mir/{layer}": distance for layer, distance in distances.items()}
        values |= {f"alignment/{name}": value for name, value in pairs.items()}
        skipped = {"text_only": statistics.counts.text_only, "no_equal": statistics.counts.no_equal}
        values |= {f"alignment/skipped_{name}": count for name, count in skipped.items() if count}
        return _to_numbers(values)

    def _vector_measures(
        self, image: Tensor, text: Tensor, measures: tuple[str, ...], warn_once: Callable[[str, str], None]
    ) -> dict[str, Tensor]:
        """Measure the paired rows ``(n, d1)`` and ``(n, d2)``, as far as there are enough of them."""
        dual_encoder = measures == OF_DUAL_ENCODERS
        # The modality gap is defined in a common space only.
        in_common_space = self._pair_measures is not None or image.shape[-1] == text.shape[-1]
        chosen = [m for m in measures if m in VECTOR_MEASURES and (m != "modality_gap" or in_common_space)]
        needed = {name: self._pairs_needed(name) for name in chosen}
        few = [name for name in chosen if len(image) < needed[name]]
        if few and (self._pair_measures is not None or (dual_encoder and few == chosen)):
            raise ValueError(
                f"`probe` must hold at least {max(needed.values())} pairs for {', '.join(chosen)} (k={self._k}), "
                f"got {len(image)}."
            )
        if few:
            warn_once(
                "pairs",
                f"`probe` holds {len(image)} pairs of image and text, too few for "
                f"{', '.join(f'alignment/{name} ({needed[name]})' for name in few)}.",
            )
        neighbours = functools.partial(mutual_knn, k=self._k)
        functions: dict[str, Callable[[], Tensor]] = {
            "cka": lambda: linear_cka(image, text),
            "cka_debiased": lambda: debiased_cka(image, text),
            "cka_z": lambda: pairing_z_score(linear_cka, image, text),
            "mutual_knn": lambda: neighbours(image, text),
            "mutual_knn_z": lambda: pairing_z_score(neighbours, image, text),
            "mutual_information": lambda: matrix_mutual_information(image, text, alpha=self._alpha),
            "modality_gap": lambda: modality_gap(image, text),
        }
        return {name: functions[name]() for name in chosen if name not in few}

    def _pairs_needed(self, measure: str) -> int:
        """Return the least number of pairs for which a measure is defined."""
        if measure.startswith("mutual_knn"):
            return self._k + 1
        return 4 if measure in ("cka_debiased", "cka_z") else 2


def _exchange_measures(
    counts: Counts, e: Mapping[str, Tensor], measures: tuple[str, ...], warn_once: Callable[[str, str], None]
) -> dict[str, Tensor]:
    """Compare pairs with exchanged images; NaN where nothing was exchanged."""
    if counts.no_equal and not counts.exchanged:
        warn_once(
            "images",
            "`alignment/grounding` and `alignment/image_text_shift` are not logged: no batch of `probe` holds two "
            "samples whose images have the same numbers of tokens.",
        )
    elif counts.exchanged and not counts.labels and "grounding" in measures:
        warn_once(
            "labels",
            "`alignment/grounding` is not logged: `probe` must have `labels` (B, T), and the model give logits.",
        )
    image, text, both, moved = (e[name] for name in EXCHANGED)
    shift = image_text_alignment(image, text, moved) - image_text_alignment(image, text, both)
    found = {"grounding": (counts.moved_nats - counts.nats) / counts.labels, "image_text_shift": shift}
    return {name: value for name, value in found.items() if name in measures}


def _check_names(argument: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    for value in given:
        if value not in allowed:
            raise ValueError(f"{argument} must be of {', '.join(allowed)}, got {value!r}.")


def _to_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    table = torch.stack([value.to(torch.float32) for value in values.values()])
    return {key: value for key, value in zip(values, table.tolist(), strict=True) if value == value}
