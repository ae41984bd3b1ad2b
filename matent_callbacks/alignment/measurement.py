"""Measures image-text alignment of a model on a probe of pairs: once, or for both frameworks' callbacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.gathering import held_first
from matent_callbacks.accumulate.reduction import AllOrNone, agree, check_groups, is_distributed
from matent_callbacks.alignment.dual_encoder import is_dual_encoder
from matent_callbacks.alignment.first_pairs import FirstPairs, Probe
from matent_callbacks.alignment.in_parts import in_parts
from matent_callbacks.alignment.statistics import (
    EXCHANGED,
    PairStatistics,
    Stages,
    distances_by_layer,
    merged,
    over_ranks,
    read_dual_encoder,
    read_vision_language,
)
from matent_callbacks.alignment.values import SUMMARIZED_BY_MAXIMUM, AlignmentValues
from matent_callbacks.capture.inference import device_of, side_effect_free
from matent_callbacks.capture.influence import Influence, sample_of_weights
from matent_callbacks.capture.meshes import parallel_groups
from matent_callbacks.capture.probes import fingerprint, prefix_of, probes_by_prefix
from matent_callbacks.functional.alignment import STAGES, TOWERS

_Result = TypeVar("_Result")
Guard = Callable[[str], AbstractContextManager[Any]]


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
    """Measure once what ``AlignmentCallback`` logs: how well image and text agree inside a model, on a probe of pairs.

    This is side-effect-free inference: evaluation mode, no gradients, and the model is left as it was.

    Args:
        model: A vision-language model or a dual encoder, wrapped or not.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; or a mapping of
            several named probes, whose names are put before the names of their values.
        basis: What the two ratios are computed from, ``"effective_rank"`` or ``"entropy"``.
        metrics: ``"effective_rank"``, ``"matrix_entropy"``, or both.
        pair_measures: Any of ``cka``, ``cka_debiased``, ``cka_z``, ``mutual_knn``, ``mutual_knn_z``,
            ``mutual_information``, ``modality_gap`` and, of vision-language models, ``grounding``,
            ``image_text_shift``, ``mir`` and ``mir_by_layer``. ``None``: all of a dual encoder; ``cka_debiased``,
            ``cka_z``, ``mutual_knn``, ``mutual_knn_z``, ``grounding`` and ``image_text_shift`` of a vision-language
            model, as far as the probe has enough pairs and labels. Without the last two there is no second forward.
        stages: For a model whose stages are not found: a function from (model, batch) to the five
            :class:`~matent_callbacks.Stage` and the number of samples it left out, or a
            mapping of five functions from (model, batch) to ``(hidden_states, mask)``.
        towers: Paths of the image tower and the text tower of a dual encoder that is not like CLIP.
        k: Number of neighbours in ``mutual_knn`` and ``mutual_knn_z``.
        alpha: Order of ``mutual_information``.

    Returns:
        The values by the names under which the callback logs them.

    Raises:
        ValueError: If an argument is out of range, or the probe or the model cannot be read.

    Example:
        >>> from matent_callbacks import measure_alignment
        >>> # measure_alignment(clip_model, {"input_ids": ids, "pixel_values": pixels})["alignment/cka"]
    """
    if probe is None:
        raise ValueError("`probe` must be a batch of pairs, a list of them, or several by name, got None.")
    return AlignmentMeasurement(
        probe=probe,
        basis=basis,
        metrics=metrics,
        pair_measures=pair_measures,
        stages=stages,
        towers=towers,
        k=k,
        alpha=alpha,
    ).measure(model)


class AlignmentMeasurement:
    """Measures a model on probes of pairs, with the arguments of an alignment callback."""

    def __init__(
        self,
        *,
        probe: Any,
        stages: Stages | None,
        towers: tuple[str, str] | None,
        num_pairs: int = 16,
        name: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        **computed: Any,
    ) -> None:
        check_groups(process_group, context_group)
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        self._computed = AlignmentValues(**computed)
        if isinstance(stages, Mapping) and set(stages) != set(STAGES):
            raise ValueError(f"`stages` must have a function for each of {', '.join(STAGES)}, got {sorted(stages)}.")
        if stages is not None and towers is not None:
            raise ValueError("`stages` is for vision-language models and `towers` for dual encoders: pass one of them.")
        if stages is not None and context_group is not None:
            raise ValueError("`context_group` is for models whose stages are found: pass it or `stages`, not both.")
        if self._computed.needs_layers and context_group is not None:
            raise ValueError(
                "`pair_measures` asks for 'mir', which is of whole sequences, and there is `context_group`."
            )
        prefix = prefix_of(name)
        # Functions of the user's may take any batch.
        self._given = probes_by_prefix(probe, prefix, check=stages is None)
        self._prefix = prefix
        self._num_pairs = num_pairs
        self._name = name
        self._given_group = self._group = process_group
        self._context_group = context_group
        self._stages = stages
        self._towers = towers
        self._warned: set[str] = set()
        self.forget()

    def renewed(self) -> AlignmentMeasurement:
        """Return a copy with the same arguments, but without a probe that was found."""
        new = copy.copy(self)
        new._group = self._given_group
        new.forget()
        return new

    def forget(self) -> None:
        """Forget the probes that were found, and what earlier readings were."""
        self._probes = {prefix: Probe(batches) for prefix, batches in self._given.items()}
        self._first_pairs = FirstPairs(self._num_pairs)

    def set_up(self, trainer: Any, others: Iterable[AlignmentMeasurement], guard: Guard) -> None:
        """Find the ranks whose pairs belong together from a Trainer's device mesh, unless they were given.

        Raises:
            ValueError: If one of ``others`` logs under the same names.
        """
        with guard("the choice of ranks by the Trainer's device mesh"):
            if self._group is None:
                self._group = parallel_groups(trainer).process_group
        for other in others:
            if other is not self and set(self.prefixes) & set(other.prefixes):
                raise ValueError(
                    "Two `AlignmentCallback`s would log the same values, one over the other: give one of them a "
                    f"`name`; got `name` {other._name!r} and {self._name!r}."
                )

    @property
    def is_given_a_probe(self) -> bool:
        """Whether the user gave the probe, which is then measured everywhere."""
        return bool(self._given)

    @property
    def summarized_by_maximum(self) -> list[str]:
        """The names whose maximum over the run belongs in a run's summary, beside their last value."""
        return [f"{prefix}{key}" for prefix in self.prefixes for key in SUMMARIZED_BY_MAXIMUM]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the names of the values, one for each probe."""
        return tuple(self._given) or (self._prefix,)

    def measure(
        self,
        model: nn.Module,
        *,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        loader: Callable[[], Any] | None = None,
        evaluates: bool = False,
    ) -> dict[str, float]:
        """Measure all values on each probe; forwards run inside ``around()``.

        Where no probe was given, it is the first pairs of what ``loader`` returns: with ``evaluates`` of its data,
        without it those of the first call, so that the readings of training are all of the same pairs.

        Raises:
            Exception: On every rank, if a probe cannot be read on one of them.
        """
        values: dict[str, float] = {}
        for prefix in self.prefixes:

            def find(prefix: str = prefix) -> Probe:
                if prefix in self._probes or loader is None:
                    return self._probes[prefix]
                return self._first_pairs.of(loader()) if evaluates else self._first_pairs.of_training(loader)

            statistics, influence = self._statistics(model, find, around)
            distances: dict[str, Tensor] = {}
            if self._computed.needs_layers and not self._is_dual_encoder(model):
                distances = distances_by_layer(statistics.layers, model, self._group)
            own = self._computed.compute(statistics, distances, self._warn_once)
            if influence.is_missing(own, sample_of_weights(model)):
                warnings.warn(Influence.MISSING.format(probe="`probe`"), stacklevel=2)
            values |= {f"{prefix}{key}": value for key, value in own.items()}
        return values

    def _statistics(
        self, model: nn.Module, find: Callable[[], Probe], around: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[PairStatistics, Influence]:
        """Read a probe on each rank, and merge what was read from all batches on all ranks."""

        def read() -> tuple[list[PairStatistics], list[int], Influence]:
            batches, fingerprints, influence = self._found(model, find)
            context = None if self._is_dual_encoder(model) else self._context_group
            with side_effect_free(model), around(), in_parts(model, context):
                return self._read(model, batches), fingerprints, influence

        of_batches, fingerprints, influence = _on_all_ranks_or_none(read, "read the probe", model, self._group)
        stages = (*STAGES, *EXCHANGED) if self._computed.needs_exchange else STAGES
        names = TOWERS if self._is_dual_encoder(model) else stages
        if not is_distributed(self._group):
            return merged(of_batches, names, model), influence
        # As a rule all ranks are given the same probe: each reads it, and it counts once.
        mine = held_first(fingerprints, device_of(model), self._group)
        own = [statistics for statistics, first in zip(of_batches, mine, strict=True) if first]
        return over_ranks(merged(own, names, model), self._group), influence

    def _found(self, model: nn.Module, find: Callable[[], Probe]) -> tuple[list[Any], list[int], Influence]:
        """Return the batches of this rank's probe, with hashes of them in a distributed run.

        On all ranks of a context group they are the same, or all raise.
        """

        def found() -> tuple[list[Any], list[int], Influence]:
            probe = find()
            batches = [probe.batches] if isinstance(probe.batches, Mapping | Tensor) else list(probe.batches)
            return batches, [fingerprint(batch) for batch in batches] if is_distributed() else [], probe.influence

        group = self._context_group
        if group is None or not is_distributed(group):
            return found()
        batches, fingerprints, influence = _on_all_ranks_or_none(found, "find the probe", model, group)
        if agree(str(fingerprints), False, device_of(model), group).descriptions:
            raise ValueError("`probe` must be the same on all ranks of `context_group`, got unlike batches.")
        return batches, fingerprints, influence

    def _read(self, model: nn.Module, batches: list[Any]) -> list[PairStatistics]:
        """Read the batches of this rank's probe."""
        if not batches and not is_distributed(self._group):
            raise ValueError("`probe` must hold at least one batch, got none.")
        if self._is_dual_encoder(model):
            return [read_dual_encoder(model, batch, self._towers) for batch in batches]
        exchange, layers = self._computed.needs_exchange, self._computed.needs_layers
        return [
            read_vision_language(
                model, batch, self._stages, exchange=exchange, layers=layers, warn_once=self._warn_once
            )
            for batch in batches
        ]

    def _is_dual_encoder(self, model: nn.Module) -> bool:
        return self._towers is not None or (self._stages is None and is_dual_encoder(model))

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, stacklevel=2)


def _on_all_ranks_or_none(
    work: Callable[[], _Result], failure: str, model: nn.Module, group: dist.ProcessGroup | None
) -> _Result:
    """Return the result of ``work``; if it raises on one rank, raise on all, which would wait for that one."""
    groups = [group] if is_distributed(group) else []
    with AllOrNone(device_of(model), groups, f"Another rank failed to {failure}."):
        return work()
