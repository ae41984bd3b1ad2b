"""Puts readings of any kind into a Trainer's log records and evaluation metrics."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.guard import unguarded
from matent_callbacks.transformers._attach import AttachedCallback, running_evaluation
from matent_callbacks.transformers._progress_bar import show_in_bar

Halves = Generator[None, Any, None]
"""What is done before and after a method of the Trainer: it yields in between, and is sent what the method returned."""

# Attribute of a Trainer: the callbacks that have wrapped its methods.
_AROUND = "_matent_callbacks"


class MeasuringCallback(AttachedCallback):
    """Puts the values of a step into the Trainer's own record of it, and those of an evaluation among its metrics."""

    order = 0

    during_eval: bool
    prog_bar: bool

    def start_over(self) -> None:
        self._pending: dict[str, float] = {}
        self._pending_step = 0
        self._in_evaluation = False
        self._joined_late = False

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        # Kept at the Trainer itself: as a key it would have to be hashable, and TRL has Trainers that are dataclasses.
        around_already = vars(trainer).setdefault(_AROUND, [])
        if self not in around_already:
            around_already.append(self)
            # There is no event at the start of an evaluation, and none when a step raises.
            for name, around in self.wrappers().items():
                setattr(trainer, name, self._wrapped_method(trainer, name, around))

    # For subclasses to define

    def wrappers(self) -> dict[str, Callable[..., Halves]]:
        """Return the Trainer's methods to wrap, each with a generator that is called with it and its arguments."""
        return {"evaluation_loop": self._around_evaluation_loop}

    def is_due(self, state: TrainerState) -> bool:
        """Whether the step that is over is monitored."""
        raise NotImplementedError

    def step_values(self, state: TrainerState) -> dict[str, float]:
        """Return the readings of that step."""
        raise NotImplementedError

    def begin_evaluation(self) -> None:
        """Called before the first batch."""

    def join_evaluation(self, model: nn.Module, batch: Any) -> None:
        """Called instead if the Trainer was found only after the first batch, with that batch."""

    def evaluation_values(self) -> dict[str, float]:
        """Return the readings of the evaluation that is over."""
        raise NotImplementedError

    # Events

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_due(state):
            return
        # The readings go into the Trainer's own record of this step, with the loss. It is requested first: all ranks
        # gather the loss for it together, even if the reading fails on one of them.
        control.should_log = True
        self._pending_step = state.global_step
        self._pending.update(self.step_values(state))

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
        if self._joined_late:
            self._finish_late_evaluation(logs)
        elif state.global_step != self._pending_step:
            return  # the record of an earlier step, from another callback's background reading
        pending, self._pending = self._pending, {}
        logs.update(pending)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(pending)
        if self.prog_bar and pending:
            with self.guard("the progress bar"):
                show_in_bar(self.trainer, pending)

    @unguarded
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is not None:
            return
        self.find_trainer()
        under_way = running_evaluation(self.trainer)
        if self.during_eval and under_way is not None:
            self._in_evaluation = self._joined_late = True
            with self.guard("the first batch of the evaluation"):
                self.join_evaluation(*under_way)

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

    def _around_evaluation_loop(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Halves:
        if not self.during_eval:
            yield
            return
        with self.guard("the reset of the reading before an evaluation"):
            self.begin_evaluation()
        self._in_evaluation = True
        try:
            output = yield
        finally:
            self._in_evaluation = False
        bound = inspect.signature(evaluation_loop).bind(*args, **kwargs)
        bound.apply_defaults()
        output.metrics.update(self._prefixed(bound.arguments["metric_key_prefix"]))

    def _finish_late_evaluation(self, logs: dict[str, Any]) -> None:
        self._in_evaluation = self._joined_late = False
        runtime = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
        self._pending.update(self._prefixed(runtime.removesuffix("_runtime")))

    def _prefixed(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{key}": value for key, value in self.evaluation_values().items()}

    def _wrapped_method(self, trainer: Trainer, name: str, around: Callable[..., Halves]) -> Callable[..., Any]:
        method = getattr(trainer, name)

        # With the signature of the method, since several callbacks may wrap it.
        @functools.wraps(method)
        def monitored(*args: Any, **kwargs: Any) -> Any:
            if not self.is_attached_to(trainer):
                return method(*args, **kwargs)
            return self.guard.run_between(
                f"what is done around `{name}`",
                around(method, *args, **kwargs),
                functools.partial(method, *args, **kwargs),
            )

        return monitored
