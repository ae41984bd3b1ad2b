"""How readings get into a Trainer's log records and evaluation metrics, whatever is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.transformers._attach import AttachedCallback, running_evaluation

# The callbacks that are around a Trainer's methods.
_AROUND = "_matent_callbacks"


class MeasuringCallback(AttachedCallback):
    """Puts the values of a step into the Trainer's own record of it, and those of an evaluation among its metrics."""

    order = 0

    def __init__(self, *, during_eval: bool) -> None:
        self.during_eval = during_eval
        self._pending: dict[str, float] = {}
        self._in_evaluation = False
        self._joined_late = False

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        # Known to the Trainer itself: a Trainer may be of a kind that no set can hold (TRL has dataclasses of them).
        around_already = vars(trainer).setdefault(_AROUND, [])
        if self not in around_already:
            around_already.append(self)
            # There is no event at the start of an evaluation, and none when a step raises.
            for name, around in self.wrappers().items():
                setattr(trainer, name, self._wrapped_method(trainer, getattr(trainer, name), around))

    # What there is to measure

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """The Trainer's methods to run around, each with what is called with it and its arguments."""
        return {"evaluation_loop": self._around_evaluation_loop}

    def step_values(self, state: TrainerState) -> dict[str, float] | None:
        """The readings that belong to the step that is over; None where it is not monitored."""
        raise NotImplementedError

    def begin_evaluation(self) -> None:
        """Called before the first batch."""

    def join_evaluation(self, model: nn.Module, batch: Any) -> None:
        """Called instead where the Trainer was found only after the first batch, with that batch."""

    def evaluation_values(self) -> dict[str, float]:
        """The readings of the evaluation that is over."""
        raise NotImplementedError

    # Events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._pending = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        values = self.step_values(state)
        if values is None:
            return
        self._pending.update(values)
        # The Trainer's record of this step is where they go: one record a step, with the loss. Also where the reading
        # failed: the ranks gather the loss for it together.
        control.should_log = True

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
        # log_history has its own copy of the record already.
        state.log_history[-1].update(self._pending)
        logs.update(self._pending)
        self._pending = {}

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is not None:
            return
        self.find_trainer()
        under_way = running_evaluation(self.trainer)
        if self.during_eval and under_way is not None:
            self._in_evaluation = self._joined_late = True
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

    # Inside

    def _around_evaluation_loop(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.during_eval:
            return evaluation_loop(*args, **kwargs)
        bound = inspect.signature(evaluation_loop).bind(*args, **kwargs)
        bound.apply_defaults()
        self.begin_evaluation()
        self._in_evaluation = True
        try:
            output = evaluation_loop(*args, **kwargs)
        finally:
            self._in_evaluation = False
        output.metrics.update(self._prefixed(bound.arguments["metric_key_prefix"]))
        return output

    def _finish_late_evaluation(self, logs: dict[str, Any]) -> None:
        self._in_evaluation = self._joined_late = False
        runtime = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
        self._pending.update(self._prefixed(runtime.removesuffix("_runtime")))

    def _prefixed(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{key}": value for key, value in self.evaluation_values().items()}

    def _wrapped_method(
        self, trainer: Trainer, method: Callable[..., Any], around: Callable[..., Any]
    ) -> Callable[..., Any]:
        # With the signature of what it is around: several callbacks may be around one method.
        @functools.wraps(method)
        def monitored(*args: Any, **kwargs: Any) -> Any:
            if not self.is_attached_to(trainer):
                return method(*args, **kwargs)
            return around(method, *args, **kwargs)

        return monitored
