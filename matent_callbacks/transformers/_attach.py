"""How a callback reaches the Trainer that it was handed to: the one place that knows the Trainer's inside."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback


class TrainerSteps(Protocol):
    """What is called in place of the Trainer's own methods, which come as the first argument."""

    def is_attached_to(self, trainer: Trainer) -> bool: ...

    def around_training_step(self, training_step: Any, *args: Any, **kwargs: Any) -> Any: ...

    def around_evaluation_loop(self, evaluation_loop: Any, prefix: str, *args: Any, **kwargs: Any) -> Any: ...


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer whose event is being handled: events carry the model and the loaders, but never the Trainer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back
    return None


def running_evaluation(trainer: Trainer) -> tuple[Any, Any] | None:
    """Model and batch of the evaluation loop that is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "evaluation_loop" and frame.f_locals.get("self") is trainer:
            return frame.f_locals["model"], frame.f_locals["inputs"]
        frame = frame.f_back
    return None


def move_to_front(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put the callback before the reporters, so that what it adds to a log record reaches them."""
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
    callbacks.insert(0, callback)


def wrap_steps(trainer: Trainer, callback: TrainerSteps) -> None:
    """Run the callback around training steps and evaluation loops for as long as it is attached.

    There is no event at the start of an evaluation, and none when a step raises; around the methods, hooks exist only
    while a monitored forward runs and are gone whatever happens in it.
    """
    training_step, evaluation_loop = trainer.training_step, trainer.evaluation_loop
    signature = inspect.signature(evaluation_loop)

    def monitored_training_step(*args: Any, **kwargs: Any) -> Any:
        if not callback.is_attached_to(trainer):
            return training_step(*args, **kwargs)
        return callback.around_training_step(training_step, *args, **kwargs)

    def monitored_evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        if not callback.is_attached_to(trainer):
            return evaluation_loop(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        prefix = bound.arguments["metric_key_prefix"]
        return callback.around_evaluation_loop(evaluation_loop, prefix, *args, **kwargs)

    trainer.training_step = monitored_training_step
    trainer.evaluation_loop = monitored_evaluation_loop
