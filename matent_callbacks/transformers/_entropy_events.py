"""The Hugging Face Trainer callback: translates the Trainer's events and log records; the numbers are the monitor's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.entropy_callback import SharedEntropyCallback
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.transformers._background_readings import LateReading
from matent_callbacks.transformers._log_records import Halves, MeasuringCallback, log_record
from matent_callbacks.transformers._padding_samples import counted_samples
from matent_callbacks.transformers._reporters import show, takes_pictures


@with_arguments_of(SharedEntropyCallback)
class MatrixEntropyCallback(SharedEntropyCallback, MeasuringCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while a ``Trainer`` trains it.

    Where the Trainer logs at a monitored step, the values are in its record, beside the loss. Elsewhere they get a
    record of their own under that step, so the Trainer's records are what they are without the callback. Every reporter
    (W&B, TensorBoard, ...) and ``state.log_history`` have them. In evaluation they are among the metrics, so that
    ``metric_for_best_model`` and early stopping can use them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``eval_<metric>/<layer>``                     in evaluation (or the prefix that ``evaluate`` is given)
    ``diff_erank/<layer>``                        with ``reference``: its effective rank minus that of the model now
    ``nonfinite_tokens/<layer>``                  in training, where tokens were left out because they held NaN or Inf
    ``matrix_entropy_error/<layer>``              with ``solver="approximate"``: the standard error of the entropy, nats
    ============================================  ===================================================================

    Without ``probe`` the training forward of the step is read as it happens, over all its micro-batches: no second
    forward, and the weights are those before the update. With ``probe`` the same batches are run in evaluation mode
    after the update, so that the curve is free of data noise and dropout, and the last record describes the model
    that is saved. Either way training is bitwise what it is without the callback. In a compiled model hooks do not
    fire: there the training forward is re-executed eagerly, from the same random state.

    If a trainer runs a model several times in a step (TRL's), only forwards with gradients are read in training: no
    generation, no reference. In evaluation nothing has gradients: there generation and a reference that is the model
    with other PEFT adapters active, or none, are left out.

    In a distributed run every rank logs the reading over the tokens of all ranks. Padding samples, which accelerate
    repeats to complete the last evaluation batch, count once, except where they cannot be identified: an iterable data
    set with ``dispatch_batches=False``, or a batch sampler without a ``batch_size``. If reading fails on one rank, only
    its share is missing; but under FSDP a probe whose forward fails on one rank leaves the others waiting in theirs.

    Example:
        >>> from matent_callbacks.transformers import MatrixEntropyCallback
        >>> callback = MatrixEntropyCallback(every_n_steps=50, layers="all")
        >>> # Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def start_over(self) -> None:
        super().start_over()
        self._late = LateReading()
        self._probed_step = -1

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        self.watch(trainer.model, trainer, trainer.callback_handler.callbacks)
        # Made now: a rank that has no batch to evaluate, or fails to read any, still computes with the others.
        self._measurement.evaluation_monitor(trainer.model)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return self._measurement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._measurement.load_state_dict(state)

    def wrappers(self) -> dict[str, Callable[..., Halves]]:
        # Around the steps, so that hooks exist only during a monitored forward and are removed whatever happens in it.
        return {
            **super().wrappers(),
            "training_step": self._around_training_step,
            "prediction_step": self._around_prediction_step,
            "_save_checkpoint": self._before_saving,
        }

    def is_due(self, state: TrainerState) -> bool:
        due = state.global_step % self.every_n_steps == 0
        return due or (bool(self._measurement.probes) and state.global_step == state.max_steps)

    def step_values(self, state: TrainerState) -> dict[str, float]:
        values = self._probe(state) if self._measurement.probes else self._measurement.from_forwards()
        if not self._measurement.background:
            return values()
        self._log_late()
        self._late.begin(state, values)
        return {}

    def begin_evaluation(self) -> None:
        self._measurement.begin_evaluation()

    def join_evaluation(self, model: nn.Module, batch: Any) -> None:
        # The first batch is over: it is run again, now that the method is wrapped.
        self.trainer.prediction_step(model, batch, prediction_loss_only=True)

    def evaluation_values(self) -> dict[str, float]:
        return self._measurement.evaluation_values()

    def begin(self, state: TrainerState) -> None:
        self.warn_if_never_due(state.max_steps)
        self._measurement.begin(self.trainer.model, resumed=state.global_step > 0)
        self.keep_state(state)

    def was_logged(self, values: Mapping[str, float]) -> None:
        super().was_logged(values)
        self._show_pictures()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._log_late()
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        unseen = best_was_loaded or self._probed_step != state.global_step
        if self._measurement.probes and unseen:
            values = self._probe(state)()
            with self.guard("the record of the last reading"):
                if values:
                    log_record(self.trainer, values, step=state.global_step, epoch=state.epoch)
        self._show_pictures(last=True)

    def _around_training_step(
        self, training_step: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Halves:
        left = -(self.trainer.state.global_step + 1) % self.every_n_steps
        if self._measurement.probes or left >= self.window_steps:
            yield
        else:
            yield from self._reading(self._measurement.monitor(model), inputs, training_only=True)

    def _around_prediction_step(
        self, prediction_step: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Halves:
        if self._in_evaluation:
            monitor = self._measurement.evaluation_monitor(model)
            yield from self._reading(monitor, inputs, sample_mask=counted_samples(self.trainer, inputs))
        else:
            yield

    def _reading(self, monitor: EntropyMonitor, inputs: Any, **how: Any) -> Halves:
        """Keep the monitor on in between; it is on the model as it is called: prepared, wrapped, perhaps compiled."""
        try:
            monitor.start(same_adapters=True, attention_mask=self.mask_of(inputs), **how)
            yield
        finally:
            monitor.stop()

    def _probe(self, state: TrainerState) -> Callable[[], dict[str, float]]:
        self._probed_step = state.global_step
        return self._measurement.from_probe(self.trainer.model)

    def _before_saving(self, save_checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Halves:
        # So that the readings until then are in the checkpoint's log.
        self._log_late()
        yield

    def _log_late(self) -> None:
        with self.guard("the record of a background reading"):
            if self._late.log(self.trainer):
                self._show_pictures()

    def _show_pictures(self, *, last: bool = False) -> None:
        with self.guard("pictures"):
            if self._pictures is None or not takes_pictures(self.trainer):
                return
            records = self.trainer.state.log_history
            pictures = self._pictures.draw(records, self._measurement.layer_names, last=last)
            show(self.trainer, pictures, self.guard)
