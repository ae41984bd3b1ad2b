"""The measuring that both frameworks' callbacks share: what, on which model, against which reference."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Solver, check_metrics, check_solver
from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.reduction import agreed_failures, is_distributed
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.influence import Influence, sample_of_weights
from matent_callbacks.callbacks.probe import hashes, probes_by_prefix
from matent_callbacks.capture.inference import why_unfit
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.capture.meshes import ParallelGroups, parallel_groups
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.monitor.decomposition import NONFINITE
from matent_callbacks.monitor.remembered import Remembered

_DATA_SET_RANK = "sequence_effective_rank"
_Kind = Literal["training", "evaluation", "probe"]
_SETTINGS_OF_REFERENCE = ("module", "layer_offset", "max_tokens")


def check_every_n_steps(every_n_steps: int) -> None:
    """Raise ValueError unless it is a whole number above 0."""
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ValueError(f"`every_n_steps` must be a whole number above 0, got {every_n_steps!r}.")


def warn_if_never_due(every_n_steps: int, last_step: int | None, *, at_end: bool) -> None:
    """Warn if all steps of a run are fewer than ``every_n_steps``, and say whether it is measured ``at_end``."""
    if last_step is not None and 0 < last_step < every_n_steps:
        warnings.warn(
            f"`every_n_steps` is {every_n_steps}, and training ends at step {last_step}: "
            f"{'only its end is measured' if at_end else 'no step of it is measured'}.",
            stacklevel=4,
        )


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
        self._mask = mask
        self._influences = {own: Influence() for own in self.probes}
        self.background = background
        self._prefix = prefix
        self._reference = reference
        self._reference_ranks: dict[str, float] | None = None
        self._reference_of: dict[str, Any] = {}
        self._guard = guard
        self.settings = {"solver": solver, **settings}
        self._given_groups = self._groups = ParallelGroups(process_group, context_group)
        self._monitors: dict[_Kind, EntropyMonitor] = {}
        self._told: set[str] = set()
        self._remembered: dict[tuple[str, ...], Remembered] = {}

    def renewed(self, guard: Guard) -> Measurement:
        """Return a copy with the same arguments, without monitors and reference values."""
        new = copy.copy(self)
        new._guard, new._monitors, new._reference_ranks, new._told = guard, {}, None, set()
        new._groups, new._reference_of = self._given_groups, {}
        new._influences = {own: Influence() for own in self.probes}
        new._remembered = {}
        return new

    def choose_groups(self, owner: Any) -> None:
        """Find the ranks that belong together from a Trainer's device mesh, unless they were given."""
        if self._groups == ParallelGroups():
            self._groups = parallel_groups(owner)

    def monitor(self, model: nn.Module) -> EntropyMonitor:
        """Return the monitor of the model's own forwards in training."""
        return self._monitor(model, "training")

    def evaluation_monitor(self, model: nn.Module) -> EntropyMonitor:
        """Return the monitor of its forwards in evaluation, which may come in the middle of a window of training."""
        return self._monitor(model, "evaluation")

    @property
    def is_on_a_model(self) -> bool:
        """Whether the model is known, and the names of its layers with it."""
        return "training" in self._monitors

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of the layers, as in the keys."""
        return self._monitors["training"].layers

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
        return self._values(self._monitors["training"], self._prefix)

    def reset(self) -> None:
        """Discard what the monitor has read."""
        self._monitors["training"].reset()

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
        weights: list[Tensor] = []
        with self._guard("the reading of the probe"):
            monitor = self._monitor(model, "probe")
            self._read_probe(monitor, probe, around)
            values = self._values(monitor, prefix)
            weights = sample_of_weights(model)
        return lambda: self._with_difference(self._watched(values(), weights, prefix), prefix)

    def _watched(self, values: dict[str, float], weights: list[Tensor], prefix: str) -> dict[str, float]:
        """Return the values, and warn where the trained parameters have no influence on them."""
        with self._guard("a look at whether the readings of the probe change"):
            if self._influences[prefix].is_missing(values, weights):
                warnings.warn(Influence.MISSING.format(probe=self._label(prefix)), stacklevel=2)
        return values

    def _label(self, prefix: str) -> str:
        name = prefix[len(self._prefix) : -1]
        return f"`probe` {name!r}" if name else "`probe`"

    def begin(
        self,
        model: nn.Module,
        *,
        resumed: bool,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Measure the reference, or find that of the start of the run in the state of the checkpoint."""
        if self._reference is None:
            return
        of_start = self._reference == "start" or any(part is self._reference for part in model.modules())
        group = self._groups.process_group
        device = next(model.parameters()).device
        before, self._reference_of = self._reference_of, self._what_it_is_of(of_start, device)
        if is_distributed(group):
            # The ranks measure it together or not at all.
            resumed = agreed_failures([resumed], device, group)[0]
        if of_start and resumed:
            self._keep_what_holds(before)
            return
        reference = model if of_start else self._reference
        assert isinstance(reference, nn.Module)

        def measure() -> dict[str, float]:
            monitor = self.new_monitor(reference, (_DATA_SET_RANK,))
            ranks: dict[str, float] = {}
            for prefix, probe in self.probes.items():
                self._read_probe(monitor, probe, around)
                ranks |= _prefixed(prefix, monitor.compute())
            return {key: rank for key, rank in ranks.items() if f"{_DATA_SET_RANK}/" in key}

        self._reference_ranks = self._guard.values("the reference", measure)

    def _what_it_is_of(self, of_start: bool, device: torch.device) -> dict[str, Any]:
        """Return what the values of the reference depend on, as JSON types."""
        own: dict[str, list[int]] = {}
        with self._guard("the comparison of `probe` with that at the start"):
            own = {prefix: hashes(probe) for prefix, probe in self.probes.items()}
        group = self._groups.process_group
        probes: dict[str, str] = {}
        for prefix in self.probes:
            found = torch.tensor(own.get(prefix, []), dtype=torch.int64, device=device).reshape(-1, 1)
            # Ranks can have shares of it.
            everybodys = all_gather_ragged(found, group) if is_distributed(group) else [found]
            distinct = {number for part in everybodys for number in part.flatten().tolist()}
            probes[prefix] = " ".join(f"{number:x}" for number in sorted(distinct))
        settings = {name: self.settings.get(name) for name in _SETTINGS_OF_REFERENCE}
        return {"reference": "start" if of_start else "model", "probes": probes, "settings": settings}

    def _keep_what_holds(self, before: dict[str, Any]) -> None:
        """Leave out reference values from the checkpoint that are not of what is measured now, with one warning."""
        now, saved = self._reference_of, self._reference_ranks or {}
        changed = [name for name in ("reference", "settings") if before.get(name) != now[name]]
        others = [p for p in self.probes if before.get("probes", {}).get(p) != now["probes"][p] or not now["probes"][p]]
        wanted = [(p, f"{p}{_DATA_SET_RANK}/{layer}") for p in self.probes for layer in self.layer_names]
        kept = {
            key: value
            for prefix in self.probes
            for key, value in saved.items()
            if not changed and prefix not in others and key.startswith(f"{prefix}{_DATA_SET_RANK}/")
        }
        self._reference_ranks = kept
        missing = [key.replace(_DATA_SET_RANK, "diff_erank") for _, key in wanted if key not in kept]
        if not missing:
            return
        if not saved:
            reason = "the checkpoint has no reference values of this callback"
        elif "settings" in changed:
            names = ", ".join(f"`{name}`" for name in _SETTINGS_OF_REFERENCE)
            reason = f"the reference values in the checkpoint are of another {names}"
        elif changed:
            reason = "the reference values in the checkpoint are of another `reference`"
        elif others:
            reason = "the reference values in the checkpoint are of another `probe`"
        else:
            reason = "these layers have no reference values in the checkpoint"
        warnings.warn(
            f"Training was resumed without {', '.join(missing)}: {reason}, and what is measured now is not the start.",
            stacklevel=4,
        )

    def new_monitor(self, model: nn.Module, metrics: tuple[str, ...] | None = None) -> EntropyMonitor:
        """Create another monitor with the same arguments."""
        metrics = metrics or self.metrics
        monitor = EntropyMonitor(model, self.layers, metrics=metrics, **self._groups._asdict(), **self.settings)
        # So that the names of values stay the same from one evaluation to the next, each of which has new monitors.
        monitor.remembered = self._remembered.setdefault(metrics, monitor.remembered)
        return monitor

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

    def values(self, monitor: EntropyMonitor) -> dict[str, float]:
        """Compute what a monitor has read in an evaluation.

        The names are the same at each evaluation: counts of tokens with NaN or Inf are told by one warning instead.
        """
        values = self._computed(monitor, self._prefix)
        bad = {key: number for key, number in values.items() if key.startswith(f"{self._prefix}{NONFINITE}/")}
        new = [f"{key.partition('/')[2]} ({number:.0f})" for key, number in bad.items() if key not in self._told]
        self._told.update(bad)
        if new:
            warnings.warn(
                f"Tokens with NaN or Inf were left out of the readings of an evaluation: {', '.join(new)}.",
                stacklevel=2,
            )
        return {key: value for key, value in values.items() if key not in bad}

    def begin_evaluation(self) -> None:
        """Discard what is left of an evaluation that did not come to its end."""
        self._monitors["evaluation"].reset()

    def evaluation_values(self) -> dict[str, float]:
        """Compute what the monitor of evaluations has read."""
        return self.values(self._monitors["evaluation"])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return {"reference_ranks": self._reference_ranks, "reference_of": self._reference_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; an invalid state leaves no reference."""
        self._reference_ranks, self._reference_of = {}, {}
        ranks = state["reference_ranks"]
        self._reference_ranks = ranks if ranks is None else {str(key): float(value) for key, value in ranks.items()}
        self._reference_of = dict(state["reference_of"])

    def _computed(self, monitor: EntropyMonitor, prefix: str) -> dict[str, float]:
        values = self._guard.values("the numbers of a reading", monitor.compute)
        return _prefixed(prefix, values or monitor.undefined())

    def _values(self, monitor: EntropyMonitor, prefix: str) -> Callable[[], dict[str, float]]:
        if not self.background:
            values = self._computed(monitor, prefix)
            return lambda: values
        finish = monitor.undefined
        with self._guard("the beginning of a reading in the background"):
            finish = monitor.compute_later()
        return lambda: _prefixed(
            prefix, self._guard.values("the numbers of a reading in the background", finish) or monitor.undefined()
        )

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
        label = next(self._label(prefix) for prefix, own in self.probes.items() if own is probe)
        with self._guard(f"the forwards of {label}"), around():
            monitor.read(probe, attention_mask=self._mask)

    def _monitor(self, model: nn.Module, kind: _Kind) -> EntropyMonitor:
        # The model may be another object now: replaced when prepared for training, or new in a hyperparameter search.
        monitor = self._monitors.get(kind)
        if monitor is None or not monitor.fits(model):
            extra = (_DATA_SET_RANK,) if kind == "probe" and self._reference is not None else ()
            monitor = self._monitors[kind] = self.new_monitor(model, (*self.metrics, *extra))
        return monitor


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}{key}": value for key, value in values.items()}
