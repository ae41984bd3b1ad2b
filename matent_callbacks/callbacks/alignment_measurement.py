"""Measures image-text alignment of a model on a probe of pairs, for both frameworks' callbacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.gathering import held_first
from matent_callbacks.accumulate.reduction import agree, agreed_failures, is_distributed
from matent_callbacks.callbacks.alignment_reading import (
    EXCHANGED,
    TOWERS,
    Counts,
    Reading,
    Stages,
    merged,
    over_ranks,
    read_dual_encoder,
    read_vision_language,
)
from matent_callbacks.callbacks.influence import Influence, sample_of_weights
from matent_callbacks.callbacks.pair_measures import (
    EXCHANGE_MEASURES,
    OF_DUAL_ENCODERS,
    OF_VISION_LANGUAGE_MODELS,
    PAIR_MEASURES,
    VECTOR_MEASURES,
    measure_pairs,
    pairs_needed,
)
from matent_callbacks.callbacks.probe import fingerprint, probes_by_prefix
from matent_callbacks.capture.dual_encoder import is_dual_encoder
from matent_callbacks.capture.in_parts import in_parts
from matent_callbacks.capture.inference import device_of, quiet
from matent_callbacks.capture.meshes import parallel_groups
from matent_callbacks.functional.alignment import STAGES, image_reduction_ratio, image_text_alignment

SUMMARIZED_BY_MAXIMUM = (
    "alignment/image_text",
    *(f"alignment/{name}" for name in OF_VISION_LANGUAGE_MODELS),
)
"""The keys whose maximum over the run belongs in a run's summary, beside their last value."""


class _Probe(NamedTuple):
    """The batches of this rank's probe, and hashes of them in a distributed run."""

    batches: list[Any]
    fingerprints: list[int]


class AlignmentMeasurement:
    """The arguments of an alignment callback, and one measurement of a model on a probe."""

    def __init__(
        self,
        *,
        probe: Any,
        basis: Literal["effective_rank", "entropy"],
        metrics: str | Iterable[str],
        pair_measures: Iterable[str] | None,
        stages: Stages | None,
        towers: tuple[str, str] | None,
        k: int,
        alpha: float,
        prefix: str = "",
        group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for name, given, allowed in (
            ("basis", (basis,), ("effective_rank", "entropy")),
            ("metrics", self.metrics, ("effective_rank", "matrix_entropy")),
            ("pair_measures", tuple(pair_measures or ()), PAIR_MEASURES),
        ):
            for value in given:
                if value not in allowed:
                    raise ValueError(f"`{name}` must be of {', '.join(allowed)}, got {value!r}.")
        if isinstance(stages, Mapping) and set(stages) != set(STAGES):
            raise ValueError(f"`stages` must have a function for each of {', '.join(STAGES)}, got {sorted(stages)}.")
        if stages is not None and towers is not None:
            raise ValueError("`stages` is for vision-language models and `towers` for dual encoders: pass one of them.")
        if stages is not None and context_group is not None:
            raise ValueError("`context_group` is for models whose stages are found: pass it or `stages`, not both.")
        # Functions of the user's may take any batch.
        self._given_probes = self.probes = probes_by_prefix(probe, prefix, check=stages is None)
        self._prefix = prefix
        self._given_group = self._group = group
        self._context_group = context_group
        self._basis = basis
        self._pair_measures = pair_measures if pair_measures is None else tuple(pair_measures)
        self._stages = stages
        self._towers = towers
        self._k = k
        self._alpha = alpha
        self._told: set[str] = set()
        self._influences = {own: Influence() for own in self.prefixes}

    def renewed(self) -> AlignmentMeasurement:
        """Return a copy with the same arguments, but without a probe that was found."""
        new = copy.copy(self)
        new.probes, new._group = self._given_probes, self._given_group
        new._influences = {own: Influence() for own in self.prefixes}
        return new

    def choose_group(self, owner: Any) -> None:
        """Find the ranks that belong together from a Trainer's device mesh, unless they were given."""
        if self._group is None:
            self._group = parallel_groups(owner).process_group

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the names of the values, one for each probe."""
        return tuple(self._given_probes) or (self._prefix,)

    def measure(
        self,
        model: nn.Module,
        *,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        find_probe: Callable[[], Any] | None = None,
    ) -> dict[str, float]:
        """Measure all values on each probe; forwards run inside ``around()``, ``find_probe`` is used if none was given.

        Raises:
            Exception: On every rank, if a probe cannot be read on one of them.
        """
        values: dict[str, float] = {}
        for prefix in self.prefixes:
            reading = self._measure_one(model, prefix, around, find_probe)
            if self._influences[prefix].is_missing(reading, sample_of_weights(model)):
                warnings.warn(Influence.MISSING.format(probe="`probe`"), stacklevel=2)
            values |= {f"{prefix}{key}": value for key, value in reading.items()}
        return values

    def _measure_one(
        self,
        model: nn.Module,
        prefix: str,
        around: Callable[[], AbstractContextManager[Any]],
        find_probe: Callable[[], Any] | None,
    ) -> dict[str, float]:
        error: Exception | None = None
        found, readings = _Probe([], []), list[Reading]()
        try:
            found = self._found_probe(model, prefix, find_probe)
            context = None if self._is_dual_encoder(model) else self._context_group
            with quiet(model), around(), in_parts(model, context):
                readings = self._read(model, found.batches)
        except Exception as raised:
            error = raised
        # The ranks go on together or not at all: those that could read the probe would wait for the others.
        if is_distributed(self._group) and agreed_failures([error is not None], device_of(model), self._group)[0]:
            raise error or RuntimeError("Another rank failed to read the probe.")
        if error is not None:
            raise error
        return self._values(self._together(readings, found.fingerprints, model), model)

    def _found_probe(self, model: nn.Module, prefix: str, find_probe: Callable[[], Any] | None) -> _Probe:
        """Return this rank's probe; raise on all ranks of a context group unless it is the same on each of them."""
        found = _Probe([], [])
        error: Exception | None = None
        try:
            if not self.probes and find_probe is not None:
                self.probes = {self._prefix: find_probe()}
            probe = self.probes[prefix]
            batches = [probe] if isinstance(probe, Mapping | Tensor) else list(probe)
            found = _Probe(batches, [fingerprint(batch) for batch in batches] if is_distributed() else [])
        except Exception as raised:
            error = raised
        if self._context_group is not None and is_distributed(self._context_group):
            any_failed, hashes_of_ranks = agree(
                str(found.fingerprints), error is not None, device_of(model), self._context_group
            )
            if any_failed:
                raise error or RuntimeError("Another rank failed to find the probe.")
            if hashes_of_ranks:
                raise ValueError("`probe` must be the same on all ranks of `context_group`, got unlike batches.")
        if error is not None:
            raise error
        return found

    def _read(self, model: nn.Module, batches: list[Any]) -> list[Reading]:
        """Read the batches of this rank's probe."""
        if not batches and not is_distributed(self._group):
            raise ValueError("`probe` must hold at least one batch, got none.")
        return [self._read_batch(model, batch) for batch in batches]

    def _read_batch(self, model: nn.Module, batch: Any) -> Reading:
        if self._is_dual_encoder(model):
            return read_dual_encoder(model, batch, self._towers)
        return read_vision_language(model, batch, self._stages, exchange=self._exchanges(model), tell=self._tell)

    def _together(self, readings: list[Reading], fingerprints: list[int], model: nn.Module) -> Reading:
        """Merge the readings of all batches and ranks."""
        names = TOWERS if self._is_dual_encoder(model) else (*STAGES, *(EXCHANGED if self._exchanges(model) else ()))
        if not is_distributed(self._group):
            return merged(readings, names, model)
        # As a rule all ranks are given the same probe: each reads it, and it counts once.
        mine = held_first(fingerprints, device_of(model), self._group)
        own = [reading for reading, first in zip(readings, mine, strict=True) if first]
        return over_ranks(merged(own, names, model), self._group)

    def _values(self, reading: Reading, model: nn.Module) -> dict[str, float]:
        entropy = {name: torch.where(m.num_sequences > 0, m.mean, torch.nan) for name, m in reading.entropies.items()}
        values = {"entropy": entropy, "effective_rank": {name: value.exp() for name, value in entropy.items()}}
        e = values[self._basis]
        found: dict[str, Tensor] = {}
        if "image_text" in e:
            found = {
                "alignment/image_text": image_text_alignment(e["image"], e["text"], e["image_text"]),
                "alignment/image_reduction_ratio": image_reduction_ratio(e["vision_encoder"], e["connector"]),
            }
        found |= self._asked(values)
        if self._exchanges(model):
            found |= self._exchange_measures(reading.counts, [e[name] for name in EXCHANGED], model)
        found |= self._vector_measures(reading.image, reading.text, model)
        skipped = {"text_only": reading.counts.text_only, "no_equal": reading.counts.no_equal}
        found |= {f"alignment/skipped_{name}": count for name, count in skipped.items() if count}
        return _to_numbers(found)

    def _is_dual_encoder(self, model: nn.Module) -> bool:
        return self._towers is not None or (self._stages is None and is_dual_encoder(model))

    def _measures(self, model: nn.Module) -> tuple[str, ...]:
        possible = OF_DUAL_ENCODERS if self._is_dual_encoder(model) else PAIR_MEASURES
        for name in self._pair_measures or ():
            if name not in possible:
                raise ValueError(f"`pair_measures` of a dual encoder must be of {', '.join(possible)}, got {name!r}.")
        if self._pair_measures is not None:
            return self._pair_measures
        return OF_DUAL_ENCODERS if self._is_dual_encoder(model) else OF_VISION_LANGUAGE_MODELS

    def _exchanges(self, model: nn.Module) -> bool:
        """Whether the images are to be exchanged."""
        return not self._is_dual_encoder(model) and not set(EXCHANGE_MEASURES).isdisjoint(self._measures(model))

    def _asked(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{metric}/{stage}": value
            for metric in self.metrics
            for stage, value in values["entropy" if metric == "matrix_entropy" else metric].items()
            if stage not in EXCHANGED
        }

    def _exchange_measures(self, counts: Counts, e: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Compare pairs with exchanged images; NaN where nothing was exchanged."""
        image, text, both, moved = e
        if counts.no_equal and not counts.exchanged:
            self._tell(
                "images",
                "`alignment/grounding` and `alignment/image_text_shift` are not logged: no batch of `probe` holds two "
                "samples whose images have the same numbers of tokens.",
            )
        elif counts.exchanged and not counts.labels and "grounding" in self._measures(model):
            self._tell(
                "labels",
                "`alignment/grounding` is not logged: `probe` must have `labels` (B, T), and the model give logits.",
            )
        found = {
            "grounding": (counts.moved_nats - counts.nats) / counts.labels,
            "image_text_shift": image_text_alignment(image, text, moved) - image_text_alignment(image, text, both),
        }
        return {f"alignment/{name}": value for name, value in found.items() if name in self._measures(model)}

    def _vector_measures(self, image: Tensor, text: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """Measure the paired vectors of image and text, as far as there are enough pairs."""
        measures = [name for name in self._measures(model) if name in VECTOR_MEASURES]
        if self._pair_measures is None and image.shape[-1] != text.shape[-1]:
            measures = [name for name in measures if name != "modality_gap"]  # defined in a common space only
        needed = {name: pairs_needed(name, k=self._k) for name in measures}
        few = [name for name in measures if len(image) < needed[name]]
        if few and (self._pair_measures is not None or (self._is_dual_encoder(model) and few == measures)):
            raise ValueError(
                f"`probe` must hold at least {max(needed.values())} pairs for {', '.join(measures)} (k={self._k}), "
                f"got {len(image)}."
            )
        if few:
            self._tell(
                "pairs",
                f"`probe` holds {len(image)} pairs of image and text, too few for "
                f"{', '.join(f'alignment/{name} ({needed[name]})' for name in few)}.",
            )
        chosen = [name for name in measures if name not in few]
        found = measure_pairs(image, text, chosen, k=self._k, alpha=self._alpha)
        return {f"alignment/{name}": value for name, value in found.items()}

    def _tell(self, about: str, message: str) -> None:
        """Warn, once about each subject."""
        if about not in self._told:
            self._told.add(about)
            warnings.warn(message, stacklevel=2)


def _to_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    table = torch.stack([value.to(torch.float32) for value in values.values()])
    return {key: value for key, value in zip(values, table.tolist(), strict=True) if value == value}
