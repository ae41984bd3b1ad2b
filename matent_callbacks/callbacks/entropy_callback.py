"""The base class of both frameworks' ``MatrixEntropyCallback``: arguments and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Solver, check_embedding
from matent_callbacks.accumulate.reduction import check_groups
from matent_callbacks.callbacks.guard import Guard, GuardedHooks
from matent_callbacks.callbacks.layer_pictures import LayerPictures
from matent_callbacks.callbacks.measurement import Measurement, check_every_n_steps, warn_if_never_due
from matent_callbacks.callbacks.probe import prefix_of
from matent_callbacks.capture.layers import LayerSpec


class SharedEntropyCallback(GuardedHooks):
    """Arguments of ``MatrixEntropyCallback`` and their checks; the adapters translate events and log."""

    def __init__(
        self,
        every_n_steps: int = 100,
        layers: LayerSpec = "last",
        *,
        metrics: str | Iterable[str] = ("matrix_entropy", "effective_rank"),
        probe: Any = None,
        during_eval: bool = True,
        max_tokens: int | None = None,
        embedding: Embedding = "mean",
        on_error: Literal["warn", "raise"] = "warn",
        reference: Literal["start"] | nn.Module | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        prog_bar: bool = False,
        module: str | None = None,
        layer_offset: int | None = None,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "exact",
        background: bool = False,
        name: str | None = None,
        window_steps: int = 1,
        pictures: bool = True,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_every_n_steps(every_n_steps)
        check_embedding(embedding)
        check_groups(process_group, context_group)
        _check_window(window_steps, every_n_steps, probe)
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self.name = name
        self.window_steps = window_steps
        self.mask = mask
        self._with_pictures = pictures
        self._measurement = Measurement(
            layers,
            metrics=metrics,
            probe=probe,
            mask=mask,
            reference=reference,
            background=background,
            prefix=prefix_of(name),
            guard=self.guard,
            on_error=on_error,
            module=module,
            layer_offset=layer_offset,
            max_tokens=max_tokens,
            embedding=embedding,
            process_group=process_group,
            context_group=context_group,
            dtype=dtype,
            solver=solver,
        )
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._measurement = self._measurement.renewed(self.guard)
        measurement = self._measurement
        self._pictures = LayerPictures(measurement.metrics, measurement.prefixes) if self._with_pictures else None

    def warn_if_never_due(self, last_step: int | None) -> None:
        """Warn if no step is due until ``last_step``."""
        warn_if_never_due(self.every_n_steps, last_step, at_end=bool(self._measurement.probes))

    def mask_of(self, batch: Any) -> Tensor | None:
        """Return what ``mask`` returns for a batch; None without ``mask``."""
        if self.mask is None:
            return None
        if batch is None:
            raise ValueError("`mask` is made from the batch, and a step that takes `dataloader_iter` gives none.")
        return self.mask(batch)

    def watch(self, model: nn.Module, trainer: Any, callbacks: Iterable[Any]) -> None:
        """Set up the monitor of the Trainer's model, so that a wrong configuration raises before training.

        Raises:
            ValueError: If a layer is unknown, or another of ``callbacks`` logs under the same names.
        """
        with self.guard("the choice of ranks by the Trainer's device mesh"):
            self._measurement.choose_groups(trainer)
        self._measurement.monitor(model)
        self._measurement.check_probes(model)
        for other in callbacks:
            if not isinstance(other, SharedEntropyCallback) or other is self or not other._measurement.is_on_a_model:
                continue
            same = sorted(self._measurement.keys & other._measurement.keys)
            if same:
                raise ValueError(
                    f"Two callbacks would log {same[0]!r}{' and more' * (len(same) > 1)}, one over the other: give one "
                    f"of them a `name`, or other layers or metrics; got `name` {other.name!r} and {self.name!r}."
                )


def _check_window(window_steps: int, every_n_steps: int, probe: Any) -> None:
    if isinstance(window_steps, bool) or not isinstance(window_steps, int) or not 1 <= window_steps <= every_n_steps:
        raise ValueError(
            f"`window_steps` must be a whole number from 1 to `every_n_steps`, {every_n_steps}, got {window_steps!r}."
        )
    if window_steps > 1 and probe is not None:
        raise ValueError(f"`window_steps` is for training forwards, and `probe` is read instead; got {window_steps}.")
