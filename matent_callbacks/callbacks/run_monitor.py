"""The state of watching one run of training, whatever the framework: when something is measured, and what is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, check_embedding, measured_settings
from matent_callbacks.accumulate.reduction import check_groups
from matent_callbacks.callbacks.charts import Charts, LayerCharts
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.layer_pictures import LayerPictures, thinned
from matent_callbacks.callbacks.measurement import Around, Finish, Measurement
from matent_callbacks.callbacks.schedule import Schedule, warn_if_never_due
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.capture.probes import prefix_of
from matent_callbacks.monitor import EntropyMonitor

if TYPE_CHECKING:
    import numpy as np

Logged = dict[Any, dict[str, float]]
"""Values by the place where they are to be logged, as the adapter gave it when the step ended."""


class RunMonitor:
    """Watches one run of training; an adapter calls its methods, in any framework, in the order in which things happen.

    ``watch``, then ``run_begins``; for each forward of training ``batch_begins`` and ``batch_ends``, and ``step_ends``
    after each optimizer step; ``evaluation_begins``, for each batch ``evaluation_batch_begins`` and ``batch_ends``, and
    ``evaluation_ends`` for each data set; ``run_ends``. Steps are numbers of optimizer steps that are done.

    Where values are returned by place, the place is what the adapter gave as ``at`` when the step ended: values that
    are computed in the background are returned at a later step. Every rank has to call all this in the same order; what
    may fail on one rank only is guarded inside, so that the collective calls are made all the same.

    Args:
        guard: Under which errors are warnings.
        every_n_steps: Optimizer steps between two measurements.
        **others: The arguments of ``MatrixEntropyCallback`` that do not depend on a framework.
    """

    def __init__(
        self,
        guard: Guard,
        every_n_steps: int,
        layers: LayerSpec,
        *,
        embedding: Embedding,
        mask: Callable[[Any], Tensor | None] | None,
        name: str | None,
        window_steps: int,
        pictures: bool,
        charts: Charts = "few",
        process_group: dist.ProcessGroup | None,
        context_group: dist.ProcessGroup | None,
        **others: Any,
    ) -> None:
        given = locals()
        self._arguments = {name: given[name] for name in given if name not in ("self", "guard", "others")} | others
        self._schedule = Schedule(every_n_steps, window_steps)
        check_embedding(embedding)
        check_groups(process_group, context_group)
        if window_steps > 1 and others.get("probe") is not None:
            raise ValueError(
                f"`window_steps` is for training forwards, and `probe` is read instead; got {window_steps}."
            )
        self.every_n_steps = every_n_steps
        self.name = name
        self.mask = mask
        self._guard = guard
        self._measurement = Measurement(
            layers,
            embedding=embedding,
            mask=mask,
            prefix=prefix_of(name),
            guard=guard,
            process_group=process_group,
            context_group=context_group,
            **others,
        )
        measurement = self._measurement
        self._pictures = LayerPictures(measurement.metrics, measurement.prefixes) if pictures else None
        self._charts = LayerCharts(charts)
        self.records: list[dict[str, float]] = []
        """What pictures show: step and values of what was logged, by :meth:`remember`."""
        self._around: Around = nullcontext
        self._measured_step = -1
        self._late: tuple[Any, Finish] | None = None
        self._reading: EntropyMonitor | None = None

    def renewed(self, guard: Guard) -> RunMonitor:
        """Return one with the same arguments, and nothing of a run."""
        return RunMonitor(guard, **self._arguments)

    @property
    def has_probe(self) -> bool:
        """Whether probes are measured, and not the forwards of training."""
        return bool(self._measurement.probes)

    @property
    def settings(self) -> dict[str, str]:
        """What the run's settings are to say: what the layers are measured on in training."""
        data = "a probe" if self.has_probe else "training batches"
        only = ", tokens with labels" if self._arguments.get("tokens") == "labels" else ""
        return measured_settings({prefix.rstrip("/"): data + only for prefix in self._measurement.prefixes})

    @property
    def has_pictures(self) -> bool:
        """Whether pictures were asked for."""
        return self._pictures is not None

    @property
    def steps_until_logged(self) -> int:
        """The number of steps until values are logged; those from the background are logged at the next measurement."""
        return self.every_n_steps * (2 if self._measurement.background else 1)

    def watch(self, model: nn.Module, *, owner: Any = None, others: Iterable[RunMonitor] = ()) -> None:
        """Find the layers of the model, so that a wrong configuration raises before training.

        Args:
            model: The model as it is trained.
            owner: What has the device mesh of the run, such as a Trainer.
            others: Those that log in the same run.

        Raises:
            ValueError: If a layer is unknown, a probe cannot be run, or another one logs under the same names.
        """
        with self._guard("the choice of ranks by the Trainer's device mesh"):
            self._measurement.choose_groups(owner)
        self._measurement.monitor(model)
        self._measurement.check_probes(model)
        for other in others:
            same = sorted(self._measurement.keys & other._measurement.keys)
            if same and other is not self:
                raise ValueError(
                    f"Two callbacks would log {same[0]!r}{' and more' * (len(same) > 1)}, one over the other: give one "
                    f"of them a `name`, or other layers or metrics; got `name` {other.name!r} and {self.name!r}."
                )

    def run_begins(
        self,
        model: nn.Module,
        *,
        step: int = 0,
        last_step: int | None = None,
        resumed: bool | None = None,
        around: Around = nullcontext,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Measure the reference, or take it from the checkpoint.

        Args:
            model: The model as it is trained.
            step: The steps that are done.
            last_step: The step at which training ends, if that is known.
            resumed: Whether training goes on from a checkpoint; ``None``: if steps are done.
            around: Makes the context in which probes are run.
            directory: Where :meth:`save_reference` saves its hidden states, if these are compared.
        """
        self._schedule.step, self._around = step, around
        warn_if_never_due(self.every_n_steps, last_step, at_end=self.has_probe)
        with self._guard("the reset of what was read before training"):
            self._measurement.reset()
        with self._guard("the reference"):
            resumed = step > 0 if resumed is None else resumed
            self._measurement.begin(model, resumed=resumed, around=around, directory=directory)

    def save_reference(self) -> None:
        """Write what a resumed run needs besides :meth:`state_dict`, once. Each rank writes its share."""
        self._measurement.save_reference()

    def discard_step(self) -> None:
        """Discard what was read of a step that will not end; a window of several steps is kept."""
        if self._schedule.discard_step():
            self._measurement.reset()

    def batch_begins(
        self, model: nn.Module, batch: Any = None, *, step: int, completes: int | None = 1, **how: Any
    ) -> None:
        """Begin to read a forward of training, unless it belongs to no step that is due.

        Args:
            model: The model as it is called.
            batch: What ``mask`` is called with; ``None``: it is not known.
            step: The steps that are done before it.
            completes: How many steps it is part of; ``None``: any number, as in Lightning's manual optimization.
            **how: See :meth:`_begin`.
        """
        if self._schedule.reads(step, completes=completes) and not self.has_probe:
            self._begin(lambda: self._measurement.monitor(model), batch, **how)

    def batch_ends(self) -> None:
        """Remove all hooks. Also to be called if a forward fails."""
        monitor, self._reading = self._reading, None
        if monitor is not None:
            monitor.stop()

    def step_ends(self, model: nn.Module, step: int, *, at: Any, last: bool = False) -> Logged | None:
        """Measure, if that is due, and return the values by place; ``None``: nothing was due.

        Args:
            model: The model as it is trained; probes are run on it.
            step: The steps that are done.
            at: Where values of this step are to be logged.
            last: No step follows.
        """
        due = self._schedule.ends(step)
        if self.has_probe:
            if not (due or last):
                return None
            finish = self._probe(model)
        else:
            outcome = self._schedule.outcome(due=due)
            if outcome == "discard":
                self._measurement.reset()
            if outcome != "measure":
                return None
            finish = self._measurement.from_forwards()
        if not self._measurement.background:
            return {at: finish()}
        late = self.late_values()
        self._late = at, finish
        return late

    def late_values(self) -> Logged:
        """Wait for what is computed in the background, and return it by place."""
        late, self._late = self._late, None
        values = late[1]() if late is not None else {}
        return {late[0]: values} if late is not None and values else {}

    def run_ends(self, model: nn.Module, *, at: Any, replaced: bool = False) -> Logged:
        """Return what is left, and measure the probes unless they were at the last step, or weights were replaced."""
        left = self.late_values()
        if self.has_probe and (replaced or self._measured_step != self._schedule.step):
            left[at] = self._probe(model)()
        return left

    def evaluation_begins(self) -> None:
        """Discard what is left of an evaluation that did not come to its end."""
        self._measurement.begin_evaluation()

    def evaluation_batch_begins(self, model: nn.Module, batch: Any = None, *, data_set: int = 0, **how: Any) -> None:
        """Begin to read a forward of evaluation; see :meth:`batch_begins`."""
        if self._measurement.evaluates:
            self._begin(lambda: self._measurement.evaluation_monitor(model, data_set), batch, **how)

    def evaluation_ends(self, model: nn.Module, *, data_set: int = 0) -> dict[str, float]:
        """Return the values of one data set. Every rank has to call it, also one that has no part of it."""
        return self._measurement.evaluation_values(model, data_set)

    def remember(self, step: int, values: Mapping[str, float]) -> None:
        """Keep values that were logged, for the pictures; not needed if :meth:`pictures` is given the records."""
        if self._pictures is not None and (shown := self._pictures.shown(values)):
            self.records = thinned([*self.records, {"step": step, **shown}])

    def pictures(
        self, records: Sequence[Mapping[str, Any]] | None = None, *, last: bool = False
    ) -> dict[str, np.ndarray]:
        """Draw the layers of all records so far, if that is due, or training ends (``last``)."""
        if self._pictures is None:
            return {}
        shown = self.records if records is None else records
        return self._pictures.draw(shown, self._measurement.layer_names, last=last)

    def hide_charts(self, names: Iterable[str], runs: Iterable[Any], **how: Any) -> None:
        """Hide the charts that W&B would draw of most layers; see :meth:`LayerCharts.hide`."""
        self._charts.hide(names, self._measurement.layer_names, runs, **how)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return {**self._measurement.state_dict(), "records": self.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._measurement.load_state_dict(dict(state))
        self.records = list(state.get("records", ()))

    def _begin(
        self,
        monitor: Callable[[], EntropyMonitor],
        batch: Any,
        *,
        batch_mask: Tensor | None = None,
        samples: Tensor | None = None,
        training_only: bool = False,
    ) -> None:
        """Put hooks in place.

        ``batch_mask`` is used where the model is given none. ``samples`` are those of the batch that count.
        ``training_only`` leaves out forwards without gradients.
        """
        # If this fails, the batch is not read, and this rank contributes less to what is measured.
        with self._guard("batches that no mask could be made of") as making:
            mask = None if self.mask is None else _mask_of(batch, self.mask)
        self.batch_ends()
        if not making.failed:
            self._reading = monitor()
            self._reading.start(
                same_adapters=True,
                attention_mask=mask,
                batch_mask=batch_mask,
                sample_mask=samples,
                labels=_labels_of(batch),
                training_only=training_only,
            )

    def _probe(self, model: nn.Module) -> Finish:
        self._measured_step = self._schedule.step
        return self._measurement.from_probe(model, around=self._around)


def _mask_of(batch: Any, mask: Callable[[Any], Tensor | None]) -> Tensor | None:
    if batch is None:
        raise ValueError(
            "`mask` is made from the batch, and a step that takes `dataloader_iter` gives none. In a loop of your own, "
            "pass `batch`."
        )
    return mask(batch)


def _labels_of(batch: Any) -> Tensor | None:
    """Return the labels in a batch, which a framework may take out before the model is called."""
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) else None
