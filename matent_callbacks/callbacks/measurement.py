"""What a callback measures: the monitors of its model, its probes, and the values under their names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import COMPARISONS, Solver, check_metrics, check_solver
from matent_callbacks.callbacks.drift import Drift, check_drift_tokens
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.reference import DATA_SET_RANK, Reference, check_reference
from matent_callbacks.capture.inference import device_of, why_unfit
from matent_callbacks.capture.influence import Influence, sample_of_weights
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.capture.meshes import ParallelGroups, parallel_groups
from matent_callbacks.capture.probes import hashes, probes_by_prefix
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.monitor.comparison import Comparison
from matent_callbacks.monitor.decomposition import NONFINITE
from matent_callbacks.monitor.remembered import Remembered

Around: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a framework runs forwards, such as that of its precision."""
Finish: TypeAlias = Callable[[], dict[str, float]]
"""Waits for values that may be computed in the background, and returns them."""
_Kind = Literal["training", "probe", "reference"] | int


def measured_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the local names of a callback's ``__init__`` that say what is measured, and not when or where."""
    own = ("self", "every_n_steps", "during_eval", "prog_bar", "on_error", "model", "log", "reference_dir")
    return {name: value for name, value in given.items() if name not in own}


class Measurement:
    """The monitors of a callback, with the arguments that it was given, and the reference values of a run.

    The names of all values begin with ``prefix``, followed by the name of the probe if there are several. ``settings``
    are further arguments of :class:`~matent_callbacks.EntropyMonitor`.
    """

    def __init__(
        self,
        layers: LayerSpec,
        *,
        metrics: str | Iterable[str],
        probe: Any,
        mask: Callable[[Any], Tensor | None] | None,
        reference: Literal["start"] | nn.Module | None,
        background: bool,
        prefix: str,
        guard: Guard,
        solver: Solver,
        process_group: dist.ProcessGroup | None,
        context_group: dist.ProcessGroup | None,
        drift_tokens: int = 2048,
        **settings: Any,
    ) -> None:
        check_reference(reference, probe)
        self._layers = layers
        self.metrics = check_metrics(metrics, no_reference="" if reference is not None else _NO_REFERENCE)
        check_solver(solver)
        self._own_metrics = tuple(name for name in self.metrics if name not in COMPARISONS)
        compared = tuple(name for name in self.metrics if name in COMPARISONS)
        self._drift = Drift(compared, check_drift_tokens(drift_tokens), guard)
        self.probes = probes_by_prefix(probe, prefix)
        self._reference = Reference(reference, self.probes, settings, guard)
        self._mask = mask
        self._influences = {own: Influence() for own in self.probes}
        self.background = background
        self._prefix = prefix
        self._guard = guard
        self._settings = {"solver": solver, **settings}
        self._groups = ParallelGroups(process_group, context_group)
        self._monitors: dict[_Kind, EntropyMonitor] = {}
        self._evaluated: set[int] = set()
        self._warned_of: set[str] = set()
        self._remembered: dict[tuple[str, ...], Remembered] = {}
        self._mentioned: set[object] = set()

    def choose_groups(self, owner: Any) -> None:
        """Find the ranks that belong together from a Trainer's device mesh, unless they were given."""
        if self._groups == ParallelGroups():
            self._groups = parallel_groups(owner)

    def monitor(self, model: nn.Module) -> EntropyMonitor:
        """Return the monitor of the model's own forwards in training."""
        return self._monitor(model, "training", self._own_metrics or _ANY)

    @property
    def evaluates(self) -> bool:
        """Whether there is a metric that evaluation has: it has no reference."""
        return bool(self._own_metrics)

    def evaluation_monitor(self, model: nn.Module, data_set: int) -> EntropyMonitor:
        """Return the monitor of its forwards on one data set, as evaluation may interrupt a window of training."""
        self._evaluated.add(data_set)
        return self._monitor(model, data_set, self._own_metrics)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of the layers, as in the keys; none before the model is known."""
        return self._monitors["training"].layers if "training" in self._monitors else ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the names of the values of a step."""
        return tuple(self.probes) or (self._prefix,)

    @property
    def keys(self) -> set[str]:
        """The names of the values of a step; a metric that logs several values is listed by its own name."""
        return {
            f"{own}{metric}/{layer}" for own in self.prefixes for metric in self.metrics for layer in self.layer_names
        }

    def from_forwards(self) -> Finish:
        """Begin to compute what was read of training since the last call."""
        return self._values(self._monitors["training"], self._prefix)

    def reset(self) -> None:
        """Discard what was read of training."""
        self._monitors["training"].reset()

    def from_probe(self, model: nn.Module, *, around: Around = nullcontext) -> Finish:
        """Run each probe inside ``around()``; begin to compute its metrics and their difference from the reference."""
        pending = [self._from_one_probe(prefix, model, around) for prefix in self.probes]
        return lambda: {key: value for values in pending for key, value in values().items()}

    def _from_one_probe(self, prefix: str, model: nn.Module, around: Around) -> Finish:
        values: Finish = dict
        weights: list[Tensor] = []
        with self._guard("the reading of the probe"):
            extra = () if self._reference.given is None else (DATA_SET_RANK,)
            monitor = self._monitor(model, "probe", (*self._own_metrics, *extra))
            monitor.compare(self._drift.comparisons.get(prefix))
            self._read_probe(monitor, prefix, around)
            values = self._values(monitor, prefix)
            weights = sample_of_weights(model)
        return lambda: self._with_difference(self._checked(values(), weights, prefix), prefix)

    def _checked(self, values: dict[str, float], weights: list[Tensor], prefix: str) -> dict[str, float]:
        """Return the values, and warn where the trained parameters have no influence on them."""
        with self._guard("a look at whether the readings of the probe change"):
            if self._influences[prefix].is_missing(values, weights):
                warnings.warn(Influence.MISSING.format(probe=self._label(prefix)), stacklevel=2)
        return values

    def _with_difference(self, values: dict[str, float], prefix: str) -> dict[str, float]:
        unasked = () if DATA_SET_RANK in self.metrics else (f"{prefix}{DATA_SET_RANK}/",)
        kept = {key: value for key, value in values.items() if not key.startswith(unasked)}
        return kept | self._reference.difference(values)

    def _label(self, prefix: str) -> str:
        name = prefix[len(self._prefix) : -1]
        return f"`probe` {name!r}" if name else "`probe`"

    def begin(
        self,
        model: nn.Module,
        *,
        resumed: bool,
        around: Around = nullcontext,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Measure the reference, or find that of the start of the run in the state of the checkpoint.

        ``directory`` is where its hidden states are saved.
        """

        def ranks_of(reference: nn.Module) -> dict[str, float]:
            monitor = self._new_monitor(reference, (DATA_SET_RANK,))
            ranks: dict[str, float] = {}
            for prefix in self.probes:
                comparison = self._chosen(model, prefix, around) if self._drift.metrics else None
                monitor.compare(comparison)
                self._read_probe(monitor, prefix, around)
                kept = monitor.probe_tokens
                ranks |= _prefixed(prefix, monitor.compute())
                if comparison is not None:
                    self._drift.keep(prefix, comparison, kept, monitor)
            return {key: rank for key, rank in ranks.items() if f"{DATA_SET_RANK}/" in key}

        group = self._groups.process_group
        self._drift.begin(directory, of_start=self._reference.is_of_start(model))
        restored = self._reference.begin(model, self.layer_names, ranks_of, resumed=resumed, group=group)
        if restored and self._drift.metrics:
            comparisons = {
                prefix: self._chosen(model, prefix, around, self._drift.order_of(prefix)) for prefix in self.probes
            }
            self._drift.restore(comparisons, self.layer_names, self._reference.differs, device_of(model))

    def save_reference(self) -> None:
        """Write the hidden states of the reference, once, where a run that is resumed finds them."""
        self._drift.save()

    def _chosen(self, model: nn.Module, prefix: str, around: Around, order: Sequence[int] = ()) -> Comparison:
        """Choose the tokens of a probe that are compared, by the masks of one reading of the model."""
        comparison = Comparison(self._drift.metrics, self._drift.most, self._groups.process_group)
        monitor = self._new_monitor(model, _ANY)
        monitor.compare(comparison)
        self._read_probe(monitor, prefix, around)
        own: list[int] = []
        what = "the tokens of the probe that are compared with the reference"
        with self._guard(what):
            own = hashes(self.probes[prefix])
        with self._guard(what):
            comparison.choose(monitor.probe_tokens, own, device_of(model), order)
        return comparison

    def check_probes(self, model: nn.Module) -> None:
        """Raise ValueError if a probe cannot be run on the model, as far as that is known without running it."""
        runnable = self.monitor(model).runnable
        for prefix, probe in self.probes.items():
            for batch in probe if isinstance(probe, list | tuple) else [probe]:
                unfit = why_unfit(runnable, batch)
                if unfit is not None:
                    raise ValueError(
                        f"{self._label(prefix)} must hold batches as the model takes them, as the collator returns "
                        f"them; got {unfit}."
                    )

    def begin_evaluation(self) -> None:
        """Discard what is left of an evaluation that did not come to its end."""
        self._evaluated.clear()
        for kind, monitor in self._monitors.items():
            if isinstance(kind, int):
                monitor.reset()

    def evaluation_values(self, model: nn.Module, data_set: int) -> dict[str, float]:
        """Compute what was read of one data set.

        The names are the same at each evaluation: counts of tokens with NaN or Inf are told by one warning instead.
        """
        if not self.evaluates:
            return {}
        # Also for a data set without a batch on this rank: the other ranks wait for this one.
        known = data_set in self._evaluated
        monitor = self._monitors[data_set] if known else self.evaluation_monitor(model, data_set)
        values = self._computed(monitor, self._prefix)
        bad = {key: number for key, number in values.items() if key.startswith(f"{self._prefix}{NONFINITE}/")}
        new = [f"{key.partition('/')[2]} ({number:.0f})" for key, number in bad.items() if key not in self._warned_of]
        self._warned_of.update(bad)
        if new:
            warnings.warn(
                f"Tokens with NaN or Inf were left out of the readings of an evaluation: {', '.join(new)}.",
                stacklevel=2,
            )
        return {key: value for key, value in values.items() if key not in bad}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return self._reference.state_dict() | self._drift.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; an invalid state leaves no reference."""
        self._reference.load_state_dict(state)
        self._drift.load_state_dict(state)

    def _computed(self, monitor: EntropyMonitor, prefix: str) -> dict[str, float]:
        values = self._guard.values("the numbers of a reading", monitor.compute)
        return _prefixed(prefix, values or monitor.undefined())

    def _values(self, monitor: EntropyMonitor, prefix: str) -> Finish:
        if not self.background:
            values = self._computed(monitor, prefix)
            return lambda: values
        finish = monitor.undefined
        with self._guard("the beginning of a reading in the background"):
            finish = monitor.compute_later()
        return lambda: _prefixed(
            prefix, self._guard.values("the numbers of a reading in the background", finish) or monitor.undefined()
        )

    def _read_probe(self, monitor: EntropyMonitor, prefix: str, around: Around) -> None:
        # Guarded separately: if the forwards fail on one rank, the others still wait for it in `compute`.
        with self._guard(f"the forwards of {self._label(prefix)}"), around():
            monitor.read(self.probes[prefix], attention_mask=self._mask)

    def _monitor(self, model: nn.Module, kind: _Kind, metrics: tuple[str, ...]) -> EntropyMonitor:
        # The model may be another object now: replaced when prepared for training, or new in a hyperparameter search.
        monitor = self._monitors.get(kind)
        if monitor is None or not monitor.fits(model):
            monitor = self._monitors[kind] = self._new_monitor(model, metrics)
        return monitor

    def _new_monitor(self, model: nn.Module, metrics: tuple[str, ...]) -> EntropyMonitor:
        monitor = EntropyMonitor(model, self._layers, metrics=metrics, **self._groups._asdict(), **self._settings)
        # So that the names of values are the same in all evaluations, whichever data set was seen before, and the
        # reference and the probe do not both tell of the same sinks.
        monitor.remembered = self._remembered.setdefault(metrics, Remembered(self._mentioned))
        return monitor


_NO_REFERENCE = "it needs `reference`, 'start' or a model, and a `probe`"
# What is read where only layers and masks are asked for.
_ANY = ("token_norm",)


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}{key}": value for key, value in values.items()}
