"""What the callbacks of both frameworks do alike: when to measure, what, on which model, against which reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from matent_callbacks.accumulate.catalogue import Solver, check_metrics, check_solver
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.monitor import EntropyMonitor

_DATA_SET_RANK = "sequence_effective_rank"


class Guarded:
    """When to measure, and what becomes of an error in it."""

    def __init__(self, every_n_steps: int, on_error: Literal["warn", "raise"]) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be a whole number above 0, got {every_n_steps!r}.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        self.every_n_steps = every_n_steps
        self._on_error = on_error
        self._warned = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What goes wrong inside is told once and, with ``on_error="warn"``, goes no further."""
        try:
            yield
        except Exception as error:
            if self._on_error == "raise":
                raise
            if not self._warned:
                warnings.warn(f"Monitoring failed: {type(error).__name__}: {error} Training goes on.", stacklevel=4)
            self._warned = True

    def guarded(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The values, or, where it went wrong, none."""
        values: dict[str, float] = {}
        with self.guard():
            values.update(measure())
        return values


class Measurement(Guarded):
    """The arguments of a callback, the monitors that carry them out, and the reference values of a run."""

    def __init__(
        self,
        every_n_steps: int,
        layers: LayerSpec,
        *,
        metrics: str | Iterable[str],
        probe: Any,
        reference: Literal["start"] | nn.Module | None,
        max_tokens: int | None,
        on_error: Literal["warn", "raise"],
        module: str | None,
        dtype: torch.dtype,
        solver: Solver,
        background: bool,
    ) -> None:
        super().__init__(every_n_steps, on_error)
        if not (reference is None or reference == "start" or isinstance(reference, nn.Module)):
            raise ValueError(f"`reference` must be 'start', a model or None, got {reference!r}.")
        if reference is not None and probe is None:
            raise ValueError("`reference` needs a `probe`, the batch that both models are measured on; got None.")
        self.layers = layers
        self.metrics = check_metrics(metrics)
        check_solver(solver, self.metrics)
        self.probe = probe
        self.background = background
        self._reference = reference
        self._reference_ranks: dict[str, float] | None = None
        self._settings: dict[str, Any] = {"module": module, "max_tokens": max_tokens, "dtype": dtype, "solver": solver}
        self._monitors: dict[bool, EntropyMonitor] = {}

    def monitor(self, model: nn.Module) -> EntropyMonitor:
        """The monitor of the model's own forwards."""
        return self._monitor(model, probing=False)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """As they stand in the keys."""
        return self._monitors[False].layers

    def from_forwards(self) -> Callable[[], dict[str, float]]:
        """What the monitor has read since the last call, once it is asked for."""
        return self._values(self._monitors[False])

    def reset(self) -> None:
        """Forget what the monitor has read."""
        self._monitors[False].reset()

    def from_probe(
        self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Callable[[], dict[str, float]]:
        """The chosen metrics on the probe, and the difference from the reference; ``around`` each set of forwards."""
        values: Callable[[], dict[str, float]] = dict
        with self.guard():
            monitor = self._monitor(model, probing=True)
            self._read_probe(monitor, around)
            values = self._values(monitor)
        return lambda: self._with_difference(values())

    def begin(self, model: nn.Module, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Measure the reference, unless that was done before the checkpoint that the run goes on from."""
        if self._reference is None or self._reference_ranks is not None:
            return
        reference = model if self._reference == "start" else self._reference
        assert isinstance(reference, nn.Module)

        def measure() -> dict[str, float]:
            monitor = self.new_monitor(reference, (_DATA_SET_RANK,))
            self._read_probe(monitor, around)
            return monitor.compute()

        self._reference_ranks = self.guarded(measure)

    def new_monitor(self, model: nn.Module, metrics: tuple[str, ...] | None = None) -> EntropyMonitor:
        """Another monitor with the same arguments."""
        return EntropyMonitor(
            model, self.layers, metrics=metrics or self.metrics, on_error=self._on_error, **self._settings
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return {"reference_ranks": self._reference_ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._reference_ranks = state["reference_ranks"]

    def _values(self, monitor: EntropyMonitor) -> Callable[[], dict[str, float]]:
        if not self.background:
            values = self.guarded(monitor.compute)
            return lambda: values
        finish: Callable[[], dict[str, float]] = dict
        with self.guard():
            finish = monitor.compute_later()
        return lambda: self.guarded(finish)

    def _with_difference(self, values: dict[str, float]) -> dict[str, float]:
        difference = {
            key.replace(_DATA_SET_RANK, "diff_erank"): before - values[key]
            for key, before in (self._reference_ranks or {}).items()
            if key in values
        }
        unasked = () if _DATA_SET_RANK in self.metrics else (f"{_DATA_SET_RANK}/",)
        return {key: value for key, value in values.items() if not key.startswith(unasked)} | difference

    def _read_probe(self, monitor: EntropyMonitor, around: Callable[[], AbstractContextManager[Any]]) -> None:
        # Where the forwards fail on one rank, the others still wait for it in `compute`.
        with self.guard(), around():
            monitor.read(self.probe)

    def _monitor(self, model: nn.Module, *, probing: bool) -> EntropyMonitor:
        # Preparing a model for training may put another in its place; a search over hyperparameters makes new ones.
        monitor = self._monitors.get(probing)
        if monitor is None or monitor.model is not model:
            extra = (_DATA_SET_RANK,) if probing and self._reference is not None else ()
            monitor = self._monitors[probing] = self.new_monitor(model, (*self.metrics, *extra))
        return monitor
