"""Image-text alignment of a model on a probe of pairs: what both frameworks' callbacks measure."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.accumulate.reduction import (
    agreed_failures,
    all_reduce_mean,
    all_reduce_sequence_means,
    is_distributed,
)
from matent_callbacks.accumulate.sequence_mean import SequenceMean, merge_sequence_means, stage_mean
from matent_callbacks.callbacks.measurement import Guarded
from matent_callbacks.capture.dual_encoder import dual_encoder_towers, is_dual_encoder, mean_token
from matent_callbacks.capture.inference import quiet
from matent_callbacks.capture.vision_language import Stage, StageReader, vision_language_stages
from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import check_stage
from matent_callbacks.functional.alignment import STAGES, image_reduction_ratio, image_text_alignment
from matent_callbacks.functional.pairs import linear_cka, matrix_mutual_information, modality_gap, mutual_knn

Stages = StageReader | Mapping[str, Callable[[nn.Module, Any], Stage]]

PAIR_MEASURES = ("cka", "mutual_knn", "mutual_information", "modality_gap")
_TOWERS = ("image_tower", "text_tower")


class _Read(NamedTuple):
    """What one rank sees of its probe."""

    entropies: dict[str, SequenceMean]
    pairs: dict[str, Tensor]
    skipped: int


class AlignmentMeasurement(Guarded):
    """The arguments of an alignment callback, and one measurement of a model on a probe."""

    def __init__(
        self,
        every_n_steps: int,
        *,
        probe: Any,
        num_pairs: int,
        basis: Literal["effective_rank", "entropy"],
        metrics: str | Iterable[str],
        pair_measures: Iterable[str] | None,
        stages: Stages | None,
        towers: tuple[str, str] | None,
        k: int,
        alpha: float,
        on_error: Literal["warn", "raise"],
    ) -> None:
        super().__init__(every_n_steps, on_error)
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for name, given, allowed in (
            ("basis", (basis,), ("effective_rank", "entropy")),
            ("metrics", self.metrics, ("effective_rank", "matrix_entropy")),
            ("pair_measures", tuple(pair_measures or ()), PAIR_MEASURES),
        ):
            for value in given:
                if value not in allowed:
                    raise ValueError(f"`{name}` must be of {', '.join(allowed)}, got {value!r}.")
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        if isinstance(stages, Mapping) and set(stages) != set(STAGES):
            raise ValueError(f"`stages` must have a function for each of {', '.join(STAGES)}, got {sorted(stages)}.")
        if stages is not None and towers is not None:
            raise ValueError("`stages` is for vision-language models and `towers` for dual encoders: pass one of them.")
        self.probe = probe
        self.num_pairs = num_pairs
        self._basis = basis
        self._pair_measures = pair_measures if pair_measures is None else tuple(pair_measures)
        self._stages = stages
        self._towers = towers
        self._k = k
        self._alpha = alpha

    def measure(
        self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, float]:
        """All values on the probe; ``around`` the forwards. An error is said once and gives none."""
        return self.guarded(lambda: self.measure_or_raise(model, around=around))

    def measure_or_raise(
        self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, float]:
        """All values on the probe."""
        error: Exception | None = None
        read = _Read({}, {}, 0)
        with quiet(model), around():
            try:
                read = self._read(model)
            except Exception as raised:
                error = raised
        # The ranks go on together or not at all: those that could read the probe would wait for the others.
        if is_distributed() and agreed_failures([error is not None], next(model.parameters()).device)[0]:
            raise error or RuntimeError("Another rank failed to read the probe.")
        if error is not None:
            raise error
        return self._values(read)

    def _read(self, model: nn.Module) -> _Read:
        """What this rank sees of its probe."""
        batches = [self.probe] if isinstance(self.probe, Mapping) else list(self.probe)
        if self._towers is not None or (self._stages is None and is_dual_encoder(model)):
            return self._dual_encoder(model, batches)
        return self._vision_language(model, batches)

    def _vision_language(self, model: nn.Module, batches: list[Any]) -> _Read:
        entropies: dict[str, list[SequenceMean]] = {name: [] for name in STAGES}
        pairs: list[tuple[Tensor, Tensor]] = []
        skipped = 0
        for batch in batches:
            stages, without_image = self._read_stages(model, batch)
            skipped += without_image
            for name in STAGES:
                entropies[name].append(_entropy(stages[name].hidden_states, stages[name].mask))
            image, text = stages["image"], stages["text"]
            both = text.mask.any(1)  # a sample of an image alone is no pair
            pairs.append((mean_token(*image)[both], mean_token(*text)[both]))
        return _Read(_totals(entropies), self._pairs(pairs, self._pair_measures or ()), skipped)

    def _dual_encoder(self, model: nn.Module, batches: list[Any]) -> _Read:
        entropies: dict[str, list[SequenceMean]] = {name: [] for name in _TOWERS}
        pairs: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            towers = dual_encoder_towers(model, batch, self._towers)
            for name, tower in zip(_TOWERS, towers, strict=True):
                entropies[name].append(_entropy(tower.hidden_states, tower.mask))
            pairs.append((towers[0].embedding, towers[1].embedding))
        measures = PAIR_MEASURES if self._pair_measures is None else self._pair_measures
        if self._pair_measures is None and pairs[0][0].shape[-1] != pairs[0][1].shape[-1]:
            measures = tuple(name for name in measures if name != "modality_gap")  # of one space only
        return _Read(_totals(entropies), self._pairs(pairs, measures), 0)

    def _values(self, read: _Read) -> dict[str, float]:
        """Of the samples of all ranks; the measures of pairs are the mean over ranks of those of each rank's probe."""
        totals, pairs = read.entropies, read.pairs
        if is_distributed():
            totals = dict(zip(totals, all_reduce_sequence_means(list(totals.values())), strict=True))
            pairs = dict(zip(pairs, all_reduce_mean(list(pairs.values())), strict=True))
        entropy = {name: torch.where(m.num_sequences > 0, m.mean, torch.nan) for name, m in totals.items()}
        values = {"entropy": entropy, "effective_rank": {name: value.exp() for name, value in entropy.items()}}
        found: dict[str, Tensor] = {}
        if "image_text" in entropy:
            e = values["entropy" if self._basis == "entropy" else "effective_rank"]
            found = {
                "alignment/image_text": image_text_alignment(e["image"], e["text"], e["image_text"]),
                "alignment/image_reduction_ratio": image_reduction_ratio(e["vision_encoder"], e["connector"]),
            }
        found |= {**self._asked(values), **pairs}
        if read.skipped:
            found["alignment/skipped_text_only"] = torch.tensor(float(read.skipped))
        return _to_numbers(found)

    def _read_stages(self, model: nn.Module, batch: Any) -> tuple[Mapping[str, Stage], int]:
        if isinstance(self._stages, Mapping):
            stages, without_image = {name: read(model, batch) for name, read in self._stages.items()}, 0
        else:
            stages, without_image = (self._stages or vision_language_stages)(model, batch)
        return {name: Stage(*check_stage(name, *stage)) for name, stage in stages.items()}, without_image

    def _asked(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{metric}/{stage}": value
            for metric in self.metrics
            for stage, value in values["entropy" if metric == "matrix_entropy" else metric].items()
        }

    def _pairs(self, pairs: list[tuple[Tensor, Tensor]], measures: Sequence[str]) -> dict[str, Tensor]:
        """Measures of the paired vectors of image and text."""
        image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
        needed = self._k + 1 if "mutual_knn" in measures else 2
        if measures and len(image) < needed:
            raise ValueError(
                f"`probe` must hold at least {needed} pairs for {', '.join(measures)} (k={self._k}), got {len(image)}."
            )
        functions: dict[str, Callable[[], Tensor]] = {
            "cka": lambda: linear_cka(image, text),
            "mutual_knn": lambda: mutual_knn(image, text, k=self._k),
            "mutual_information": lambda: matrix_mutual_information(image, text, alpha=self._alpha),
            "modality_gap": lambda: modality_gap(image, text),
        }
        return {f"alignment/{name}": functions[name]() for name in measures}


def measure_alignment(
    model: nn.Module,
    probe: Any,
    *,
    basis: Literal["effective_rank", "entropy"] = "effective_rank",
    metrics: str | Iterable[str] = "effective_rank",
    pair_measures: Iterable[str] | None = None,
    stages: Stages | None = None,
    towers: tuple[str, str] | None = None,
    k: int = 10,
    alpha: float = 1.0,
) -> dict[str, float]:
    """What ``AlignmentCallback`` logs, once: how well image and text agree inside a model, on a probe of pairs.

    The model is run on the side, in evaluation mode and without gradient, and is as it was afterwards.

    Args:
        model: A vision-language model or a dual encoder, wrapped or not.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them.
        basis: What the two ratios are of, ``"effective_rank"`` or ``"entropy"``.
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Of ``cka``, ``mutual_knn``, ``mutual_information``, ``modality_gap``; ``None``: all of a dual
            encoder, none of a vision-language model.
        stages: For a model whose stages are not found.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Neighbours of ``mutual_knn``.
        alpha: Order of ``mutual_information``.

    Returns:
        Values by the names that the callback logs.

    Raises:
        ValueError: If an argument is out of range, or the probe or the model cannot be read.

    Example:
        >>> from matent_callbacks import measure_alignment
        >>> # measure_alignment(clip_model, {"input_ids": ids, "pixel_values": pixels})["alignment/cka"]
    """
    return AlignmentMeasurement(
        1,
        probe=probe,
        num_pairs=2,
        basis=basis,
        metrics=metrics,
        pair_measures=pair_measures,
        stages=stages,
        towers=towers,
        k=k,
        alpha=alpha,
        on_error="raise",
    ).measure_or_raise(model)


def _totals(entropies: Mapping[str, list[SequenceMean]]) -> dict[str, SequenceMean]:
    totals = {name: functools.reduce(merge_sequence_means, batches) for name, batches in entropies.items()}
    for name, total in totals.items():
        if total.num_nonfinite:
            warnings.warn(
                f"{int(total.num_nonfinite)} tokens of {name!r} are NaN or Inf; they are left out.", stacklevel=2
            )
    return totals


def _entropy(hidden_states: Tensor, mask: Tensor) -> SequenceMean:
    return stage_mean(hidden_states, mask, dtype=statistics_dtype(hidden_states))


def _to_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    table = torch.stack([value.to(torch.float32) for value in values.values()])
    return {key: value for key, value in zip(values, table.tolist(), strict=True) if value == value}
