"""The Hugging Face Trainer callback: translates the Trainer's events and log records; the numbers are the monitor's."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks._catalogue import check_metrics
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.transformers._attach import calling_trainer, move_to_front, running_evaluation, wrap_steps


class MatrixEntropyCallback(TrainerCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while a ``Trainer`` trains it.

    The values stand in the Trainer's own log record of the step, beside the loss, so that every reporter (W&B,
    TensorBoard, ...) and ``state.log_history`` have them; in evaluation they are among the metrics, so that
    ``metric_for_best_model`` and early stopping can use them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``eval_<metric>/<layer>``                     in evaluation (or the prefix that ``evaluate`` is given)
    ``nonfinite_tokens/<layer>``                  where tokens were left out because they held NaN or Inf
    ============================================  ===================================================================

    Without ``probe`` the training forward of the step is read as it happens, over all its micro-batches: no second
    forward, and the weights are those before the update. With ``probe`` the same batches are run in evaluation mode
    after the update, so that the curve is free of data noise and dropout, and the last record describes the model
    that is saved. Either way training is bitwise what it is without the callback.

    Args:
        every_n_steps: Optimizer steps between two readings.
        layers: As in :class:`~matent_callbacks.EntropyMonitor`: ``"last"``, ``"all"``, ints, ``"every:4"``, module
            names or globs, or a list of these.
        metrics: Names of the catalogue of :class:`~matent_callbacks.EntropyMonitor`.
        probe: One batch (a mapping of the model's keyword arguments) or a list of them.
        during_eval: Also read evaluation and prediction forwards.
        max_tokens: Upper bound on the tokens that one reading accumulates per layer.
        on_error: ``"warn"``: what goes wrong in monitoring is said once and training goes on; ``"raise"``.
        module: Path of the part of the model whose layers these are.
        dtype: Of the statistics, float32 or float64.

    Raises:
        ValueError: Here for an argument out of range or an unknown metric; when the Trainer is made (or the callback
            added) for an unknown layer, with near matches.

    Example:
        >>> from matent_callbacks.transformers import MatrixEntropyCallback
        >>> callback = MatrixEntropyCallback(every_n_steps=50, layers="all")
        >>> # Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        layers: LayerSpec = "last",
        *,
        metrics: str | Iterable[str] = ("matrix_entropy", "effective_rank"),
        probe: Any = None,
        during_eval: bool = True,
        max_tokens: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        module: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be a whole number above 0, got {every_n_steps!r}.")
        self.every_n_steps = every_n_steps
        self.probe = probe
        self.during_eval = during_eval
        self._on_error = on_error
        self._monitor_arguments: dict[str, Any] = {
            "layers": layers,
            "metrics": check_metrics(metrics),
            "module": module,
            "max_tokens": max_tokens,
            "dtype": dtype,
            "on_error": on_error,
        }
        self._trainer: Any = None
        self._wrapped: weakref.WeakSet[Trainer] = weakref.WeakSet()
        self._monitor: EntropyMonitor | None = None
        self._pending: dict[str, float] = {}
        self._late_evaluation = False
        self._probed_step = -1
        self._warned = False

    def attach(self, trainer: Trainer) -> None:
        """Tie the callback to a Trainer. Needed only where the Trainer cannot be found from its events.

        Args:
            trainer: The Trainer to monitor; the callback is added to it if it is not there.
        """
        move_to_front(trainer, self)
        self._trainer = trainer
        if trainer not in self._wrapped:
            self._wrapped.add(trainer)
            wrap_steps(trainer, self)
        self._current_monitor()

    def is_attached_to(self, trainer: Trainer) -> bool:
        """Whether this is the Trainer that is monitored; False once the callback was removed from it."""
        return self._trainer is trainer and self in trainer.callback_handler.callbacks

    # Events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._find_trainer()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._find_trainer()
        self._pending, self._probed_step = {}, -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_monitored(state.global_step, state.max_steps):
            return
        self._pending.update(self._probe_values(state) if self.probe is not None else self._values())
        # The Trainer's record of this step is where they go: one record a step, with the loss.
        control.should_log = bool(self._pending) or control.should_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        if self._late_evaluation:
            self._finish_late_evaluation(logs)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(self._pending)
        logs.update(self._pending)
        self._pending = {}

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self._late_evaluation:
            self._finish_late_evaluation(metrics)
            metrics.update(self._pending)
            self._pending = {}

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None:
            self._join_evaluation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.probe is None or self._trainer is None:
            return
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if best_was_loaded or self._probed_step != state.global_step:
            self._trainer.log(dict(self._probe_values(state)))

    # Around the Trainer's steps

    def around_training_step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.probe is not None or (self._state.global_step + 1) % self.every_n_steps:
            return training_step(*args, **kwargs)
        with self._current_monitor().training_forwards():
            return training_step(*args, **kwargs)

    def around_evaluation_loop(
        self, evaluation_loop: Callable[..., Any], prefix: str, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.during_eval:
            return evaluation_loop(*args, **kwargs)
        monitor = self._current_monitor()
        monitor.reset()
        with monitor:
            output = evaluation_loop(*args, **kwargs)
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._values().items()})
        return output

    # Inside

    @property
    def _state(self) -> TrainerState:
        return self._trainer.state

    def _is_monitored(self, step: int, max_steps: int) -> bool:
        return step % self.every_n_steps == 0 or (self.probe is not None and step == max_steps)

    def _find_trainer(self) -> None:
        trainer = calling_trainer(self) or self._trainer
        if trainer is None:
            raise RuntimeError("No Trainer was found behind this event: call `callback.attach(trainer)` first.")
        self.attach(trainer)

    def _current_monitor(self) -> EntropyMonitor:
        # FSDP puts another object in the place of the model; a search over hyperparameters makes new ones.
        if self._monitor is None or self._monitor.model is not self._trainer.model:
            self._monitor = EntropyMonitor(self._trainer.model, **self._monitor_arguments)
        return self._monitor

    def _values(self) -> dict[str, float]:
        return self._guarded(lambda: self._current_monitor().compute())

    def _probe_values(self, state: TrainerState) -> dict[str, float]:
        self._probed_step = state.global_step

        def measure() -> dict[str, float]:
            monitor = self._current_monitor()
            monitor.read(self.probe)
            return monitor.compute()

        return self._guarded(measure)

    def _guarded(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        if self._on_error == "raise":
            return measure()
        try:
            return measure()
        except Exception as error:
            if not self._warned:
                warnings.warn(f"Monitoring failed: {type(error).__name__}: {error} Training goes on.", stacklevel=2)
            self._warned = True
            return {}

    def _join_evaluation(self) -> None:
        """Read an evaluation that was under way before the Trainer was known: its first batch is repeated."""
        self._find_trainer()
        under_way = running_evaluation(self._trainer)
        if not self.during_eval or under_way is None:
            return
        model, batch = under_way
        self._late_evaluation = True
        monitor = self._current_monitor()
        monitor.__enter__()
        self._trainer.prediction_step(model, batch, prediction_loss_only=True)

    def _finish_late_evaluation(self, logs: dict[str, Any]) -> None:
        self._late_evaluation = False
        self._current_monitor().__exit__()
        runtime = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
        prefix = runtime.removesuffix("_runtime")
        self._pending.update({f"{prefix}_{key}": value for key, value in self._values().items()})
