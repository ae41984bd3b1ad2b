"""The measuring that both frameworks' callbacks share: what, on which model, against which reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from matent_callbacks.accumulate.catalogue import Solver, check_metrics, check_solver
from matent_callbacks.accumulate.reduction import agreed_failures, is_distributed
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.probe import probes_by_prefix
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.capture.meshes import ParallelGroups, parallel_groups
from matent_callbacks.monitor import EntropyMonitor

_DATA_SET_RANK = "sequence_effective_rank"


def check_every_n_steps(every_n_steps: int) -> None:
    """Raise ValueError unless it is a whole number above 0."""
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ValueError(f"`every_n_steps` must be a whole number above 0, got {every_n_steps!r}.")


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
        reference: Literal["start"] | nn.Module | None,
        background: bool,
        prefix: str,
        guard: Guard,
        solver: Solver,
        process_group: dist.ProcessGroup | None,
        context_group: dist.ProcessGroup | None,
        **settings: Any,
    ) -> None:
        if not (reference is None or reference == "start" or isinstance(reference, nn.Module)):
            raise ValueError(f"`reference` must be 'start', a model or None, got {reference!r}.")
        if reference is not None and probe is None:
            raise ValueError("`reference` needs a `probe`, the batch that both models are measured on; got None.")
        self.layers = layers
        self.metrics = check_metrics(metrics)
        check_solver(solver, self.metrics)
        self.probes = probes_by_prefix(probe, prefix)
        self.background = background
        self._prefix = prefix
        self._reference = reference
        self._reference_ranks: dict[str, float] | None = None
        self._guard = guard
        self.settings = {"solver": solver, **settings}
        self._given_groups = self._groups = ParallelGroups(process_group, context_group)
        self._monitors: dict[bool, EntropyMonitor] = {}

    def renewed(self, guard: Guard) -> Measurement:
        """Return a copy with the same arguments, without monitors and reference values."""
        new = copy.copy(self)
        new._guard, new._monitors, new._reference_ranks = guard, {}, None
        new._groups = self._given_groups
        return new

    def choose_groups(self, owner: Any) -> None:
        """Find the ranks that belong together from a Trainer's device mesh, unless they were given."""
        if self._groups == ParallelGroups():
            self._groups = parallel_groups(owner)

    def monitor(self, model: nn.Module) -> EntropyMonitor:
        """Return the monitor of the model's own forwards."""
        return self._monitor(model, probing=False)

    @property
    def is_on_a_model(self) -> bool:
        """Whether the model is known, and the names of its layers with it."""
        return False in self._monitors

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of the layers, as in the keys."""
        return self._monitors[False].layers

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the names of the values of a step."""
        return tuple(self.probes) or (self._prefix,)

    @property
    def keys(self) -> set[str]:
        """The names of the values of a step; a metric that logs several values is listed by its own name."""
        return {
            f"{prefix}{metric}/{layer}"
            for prefix in self.prefixes
            for metric in self.metrics
            for layer in self.layer_names
        }

    def from_forwards(self) -> Callable[[], dict[str, float]]:
        """Compute what the monitor has read since the last call; returns a function that waits for the values."""
        return self._values(self._monitors[False], self._prefix)

    def reset(self) -> None:
        """Discard what the monitor has read."""
        self._monitors[False].reset()

    def from_probe(
        self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Callable[[], dict[str, float]]:
        """Read each probe inside ``around()``; returns a function for metrics and difference from the reference."""
        readings = [self._from_one_probe(prefix, probe, model, around) for prefix, probe in self.probes.items()]
        return lambda: {key: value for values in readings for key, value in values().items()}

    def _from_one_probe(
        self, prefix: str, probe: Any, model: nn.Module, around: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[[], dict[str, float]]:
        values: Callable[[], dict[str, float]] = dict
        with self._guard("the reading of the probe"):
            monitor = self._monitor(model, probing=True)
            self._read_probe(monitor, probe, around)
            values = self._values(monitor, prefix)
        return lambda: self._with_difference(values(), prefix)

    def begin(self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Measure the reference, unless it came with the checkpoint that the run resumes from."""
        if self._reference is None:
            return
        loaded = self._reference_ranks is not None
        group = self._groups.process_group
        if is_distributed(group):
            # A rank that could not load it when another did goes without: it would be alone in measuring it.
            loaded = agreed_failures([loaded], next(model.parameters()).device, group)[0]
        if loaded:
            return
        reference = model if self._reference == "start" else self._reference
        assert isinstance(reference, nn.Module)

        def measure() -> dict[str, float]:
            monitor = self.new_monitor(reference, (_DATA_SET_RANK,))
            ranks: dict[str, float] = {}
            for prefix, probe in self.probes.items():
                self._read_probe(monitor, probe, around)
                ranks |= _prefixed(prefix, monitor.compute())
            return ranks

        self._reference_ranks = self._guard.values("the reference", measure)

    def new_monitor(self, model: nn.Module, metrics: tuple[str, ...] | None = None) -> EntropyMonitor:
        """Create another monitor with the same arguments."""
        return EntropyMonitor(
            model,
            self.layers,
            metrics=metrics or self.metrics,
            **self._groups._asdict(),
            **self.settings,
        )

    def values(self, monitor: EntropyMonitor) -> dict[str, float]:
        """Compute what a monitor has read since the last call."""
        return self._computed(monitor, self._prefix)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return {"reference_ranks": self._reference_ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        An invalid state leaves no reference: one measured now would not be from the beginning of the run.
        """
        self._reference_ranks = {}
        ranks = state["reference_ranks"]
        self._reference_ranks = ranks if ranks is None else {str(key): float(value) for key, value in ranks.items()}

    def _computed(self, monitor: EntropyMonitor, prefix: str) -> dict[str, float]:
        return _prefixed(prefix, self._guard.values("the numbers of a reading", monitor.compute))

    def _values(self, monitor: EntropyMonitor, prefix: str) -> Callable[[], dict[str, float]]:
        if not self.background:
            values = self._computed(monitor, prefix)
            return lambda: values
        finish: Callable[[], dict[str, float]] = dict
        with self._guard("the beginning of a reading in the background"):
            finish = monitor.compute_later()
        return lambda: _prefixed(prefix, self._guard.values("the numbers of a reading in the background", finish))

    def _with_difference(self, values: dict[str, float], prefix: str) -> dict[str, float]:
        ranks = f"{prefix}{_DATA_SET_RANK}/"
        difference = {
            key.replace(_DATA_SET_RANK, "diff_erank"): before - values[key]
            for key, before in (self._reference_ranks or {}).items()
            if key in values
        }
        unasked = () if _DATA_SET_RANK in self.metrics else (ranks,)
        return {key: value for key, value in values.items() if not key.startswith(unasked)} | difference

    def _read_probe(
        self, monitor: EntropyMonitor, probe: Any, around: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        # Guarded separately: if the forwards fail on one rank, the others still wait for it in `compute`.
        with self._guard("the forwards of the probe"), around():
            monitor.read(probe)

    def _monitor(self, model: nn.Module, *, probing: bool) -> EntropyMonitor:
        # The model may be another object now: replaced when prepared for training, or new in a hyperparameter search.
        monitor = self._monitors.get(probing)
        if monitor is None or not monitor.fits(model):
            extra = (_DATA_SET_RANK,) if probing and self._reference is not None else ()
            monitor = self._monitors[probing] = self.new_monitor(model, (*self.metrics, *extra))
        return monitor


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}{key}": value for key, value in values.items()}
