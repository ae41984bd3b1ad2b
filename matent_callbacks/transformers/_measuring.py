"""Puts readings of any kind into a Trainer's log records and evaluation metrics."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from torch import nn
from transformers import IntervalStrategy, Trainer, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.transformers._attach import AttachedCallback, running_evaluation

Wrapper: TypeAlias = tuple[Callable[..., None], Callable[[Any], None] | None]
"""What is called before a method of the Trainer, with the method and its arguments, and after it, with its result.

The result is None if the method raised.
"""

# Attribute of a Trainer: the callbacks that have wrapped its methods. And of its progress bar: the values beside it.
_OURS = "_matent_callbacks"


def log_record(trainer: Trainer, values: dict[str, float], *, step: int, epoch: float | None) -> None:
    """Log ``values`` in a record of their own under ``step``; all else in the Trainer is as it was before."""
    state = trainer.state
    # A record takes its step from the state, and writing one clears `should_log`, which another may have set.
    now = state.global_step, state.epoch, trainer.control.should_log
    state.global_step, state.epoch = step, epoch
    try:
        # Not the `log` of a subclass, which may add its averages since the last record, and begin new ones.
        Trainer.log(trainer, values)
    finally:
        state.global_step, state.epoch, trainer.control.should_log = now


class MeasuringCallback(AttachedCallback):
    """Puts the values of a step into the Trainer's record of it, and those of an evaluation among its metrics.

    Where the Trainer writes no record at that step, the values get one of their own: when the Trainer logs decides over
    which steps it averages the loss, so the callback never makes it log.
    """

    order = 0

    every_n_steps: int
    steps_until_logged: int
    """The number of steps until values are logged; those from the background are logged late."""
    during_eval: bool
    prog_bar: bool

    def start_over(self) -> None:
        self._pending: dict[str, float] = {}
        self._pending_step = 0
        self._in_evaluation = False
        self._joined_late = False
        self._prefix = ""

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        # Kept at the Trainer itself: as a key it would have to be hashable, and TRL has Trainers that are dataclasses.
        around_already = vars(trainer).setdefault(_OURS, [])
        if self not in around_already:
            around_already.append(self)
            # There is no event at the start of an evaluation, and none when a step raises.
            for name, wrapper in self.wrappers().items():
                setattr(trainer, name, self._wrapped_method(trainer, name, *wrapper))

    # For subclasses to define

    def wrappers(self) -> dict[str, Wrapper]:
        """Return the Trainer's methods to wrap, each with what is called around it."""
        return {
            "evaluation_loop": (self._before_evaluation, self._after_evaluation),
            "_maybe_log_save_evaluate": (self._before_logging, None),
        }

    def step_values(self, state: TrainerState) -> dict[str, float]:
        """Return what was measured at the step that is over; empty if it is not due."""
        raise NotImplementedError

    def begin_evaluation(self) -> None:
        """Called before the first batch."""

    def join_evaluation(self, model: nn.Module, batch: Any) -> None:
        """Called instead if the Trainer was found only after the first batch, with that batch."""

    def evaluation_values(self) -> dict[str, float]:
        """Return the readings of the evaluation that is over."""
        raise NotImplementedError

    def was_logged(self, values: Mapping[str, float]) -> None:
        """Called when the values of a step or an evaluation are in a log record."""
        if self.prog_bar:
            with self.guard("the progress bar"):
                _show_in_bar(self.trainer, values)

    def was_written(self, logs: Mapping[str, Any]) -> None:
        """Called with each log record, with our values in it and before the reporters have it."""

    # Events

    @guarded
    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log_pending()  # where a Trainer of the user's does not call what is wrapped

    @guarded
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pending_step = state.global_step
        self._pending.update(self.step_values(state))

    @guarded
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log_pending()

    @guarded
    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and self.trainer is not None:
            self._complete(state, logs)
            self.was_written(logs)

    def _complete(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Put the values of this step or evaluation into its record."""
        if self._joined_late:
            self._finish_late_evaluation(logs)
        elif state.global_step != self._pending_step:
            return  # the record of an earlier step, from another callback's background reading
        pending, self._pending = self._pending, {}
        if pending:
            logs.update(pending)
            # log_history has its own copy of the record already.
            state.log_history[-1].update(pending)
            self.was_logged(pending)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer is not None:
            return
        self.find_trainer()
        under_way = running_evaluation(self.trainer)
        if self.during_eval and under_way is not None:
            self._in_evaluation = self._joined_late = True
            with self.guard("the first batch of the evaluation"):
                self.join_evaluation(under_way["model"], under_way["inputs"])

    @guarded
    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self._joined_late:
            self._finish_late_evaluation(metrics)
            metrics.update(self._pending)
            self._pending = {}

    # Internals

    @guarded
    def _before_logging(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        # Every callback has had its say on whether the Trainer logs now.
        state, control, strategy = self.trainer.state, self.trainer.control, self.trainer.args.logging_strategy
        joins = control.should_log and state.global_step > self.trainer._globalstep_last_logged
        # The record of an epoch is written under the epoch's last step, in a second call.
        ends_epoch = strategy == IntervalStrategy.EPOCH and float(state.epoch or 0.5).is_integer()
        if not joins and (not ends_epoch or control.should_save or control.should_evaluate):
            self._log_pending()

    def _log_pending(self) -> None:
        pending, self._pending = self._pending, {}
        if pending:
            with self.guard("the record of a reading"):
                log_record(self.trainer, pending, step=self._pending_step, epoch=self.trainer.state.epoch)
                self.was_logged(pending)

    @guarded
    def _before_evaluation(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.during_eval:
            with self.guard("the reset of the reading before an evaluation"):
                self.begin_evaluation()
            self._in_evaluation = True
            self._prefix = _metric_key_prefix(evaluation_loop, args, kwargs)

    @guarded
    def _after_evaluation(self, output: Any) -> None:
        ended, self._in_evaluation = self._in_evaluation, False
        if ended and output is not None:
            output.metrics.update(self._prefixed(self._prefix))

    def _finish_late_evaluation(self, logs: dict[str, Any]) -> None:
        self._in_evaluation = self._joined_late = False
        runtime = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
        self._pending.update(self._prefixed(runtime.removesuffix("_runtime")))

    def _prefixed(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{key}": value for key, value in self.evaluation_values().items()}

    def _wrapped_method(
        self, trainer: Trainer, name: str, before: Callable[..., None], after: Callable[[Any], None] | None
    ) -> Callable[..., Any]:
        own = vars(trainer).get(name)

        # With the signature of the method, since several callbacks may wrap it.
        @functools.wraps(getattr(trainer, name))
        def monitored(*args: Any, **kwargs: Any) -> Any:
            # That of the class is looked up now: it may have been replaced since, as tests do with `mock.patch`.
            method = _method_of_class(trainer, name) if own is None else own
            if not self.is_attached_to(trainer):
                return method(*args, **kwargs)
            result = None
            try:
                before(method, *args, **kwargs)
                result = method(*args, **kwargs)
            finally:
                if after is not None:
                    after(result)
            return result

        return monitored


def _method_of_class(trainer: Trainer, name: str) -> Callable[..., Any]:
    method: Any = inspect.getattr_static(type(trainer), name)
    bind = getattr(type(method), "__get__", None)
    return method if bind is None else bind(method, trainer, type(trainer))  # type: ignore[no-any-return]


def _metric_key_prefix(evaluation_loop: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the prefix that an evaluation loop is called with, also where a subclass takes ``*args, **kwargs``."""
    if "metric_key_prefix" in kwargs:
        return str(kwargs["metric_key_prefix"])
    # The subclass may have other arguments than the Trainer, or another default.
    for loop in (evaluation_loop, functools.partial(Trainer.evaluation_loop, None)):
        with suppress(TypeError):
            bound = inspect.signature(loop).bind(*args, **kwargs)
            bound.apply_defaults()
            if "metric_key_prefix" in bound.arguments:
                return str(bound.arguments["metric_key_prefix"])
    return "eval"


def _show_in_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Put values behind the progress bar of training, beside those of other callbacks."""
    for callback in trainer.callback_handler.callbacks:
        bar: Any = getattr(callback, "training_bar", None)
        if hasattr(bar, "set_postfix"):
            shown = vars(bar).setdefault(_OURS, {})
            shown.update({key: f"{value:.3g}" for key, value in values.items()})
            bar.set_postfix(shown)
