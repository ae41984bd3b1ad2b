"""Stops a Hugging Face Trainer at a plateau of a logged value, and raises an alarm when one collapses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from transformers import TrainerControl, TrainerState

from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.observers import (
    Action,
    CollapseObserver,
    Observer,
    PlateauObserver,
    call_action,
    needs_arguments,
)
from matent_callbacks.transformers._attach import AttachedCallback
from matent_callbacks.transformers._reporters import alert


class ObservingCallback(AttachedCallback):
    """Observes a value in each log record that has it, and warns if it is missing where it would have been due."""

    order = 1

    def __init__(self, new_observer: Callable[[], Observer], on_error: Literal["warn", "raise"]) -> None:
        self.guard = Guard(type(self).__name__, on_error)
        self._new_observer = new_observer
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self.observer = self._new_observer()

    @property
    def monitor(self) -> str:
        """The name or glob that is observed."""
        return self.observer.monitor

    def state_dict(self) -> dict[str, Any]:
        return self.observer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.observer.load_state_dict(state)

    def begin(self, state: TrainerState) -> None:
        self.observer.unlogged.begin(state.global_step)

    @guarded
    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        watched = self.observer.watched(logs or {})
        if logs is None or not watched:
            return
        alarms = self.observer.observe(state.global_step, {key: float(logs[key]) for key in watched})
        stops = bool(alarms) and self.observer.action == "stop"
        stops_now = stops and not control.should_training_stop
        # Before anything that could fail: all ranks stop at this step or none.
        control.should_training_stop |= stops
        control.should_save |= bool(alarms) and self.observer.saves_checkpoint
        values = self.observer.logged_values(alarms)
        self.keep_state(state)
        logs.update(values)
        # log_history has its own copy of the record already.
        state.log_history[-1].update(values)
        if state.is_world_process_zero:
            self.observer.report(alarms, partial(alert, self.trainer, self.guard), stops_now=stops_now)
        call_action(self.observer, alarms, self.guard)

    @guarded
    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.observer.unlogged.was_evaluated = True

    @guarded
    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Only now: an evaluation on several data sets makes several records, and so may several callbacks.
        unlogged = self.observer.unlogged
        if state.global_step != unlogged.start:
            recorded = bool(state.log_history) and state.log_history[-1].get("step", 0) > unlogged.start
            unlogged.check(lambda: _names(state), state.global_step, self.callbacks_of_trainer, recorded=recorded)

    @guarded
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.observer.unlogged.at_end(_names(state))


class PlateauStopping(ObservingCallback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each log record with the value is one observation, whatever logs it: the training loss, an evaluation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does; if its settings have changed, the new
    ones judge the values of before, too.

    ====================================  ===========================================================================
    ``plateau/<monitor>``                 trend: estimated change of the value per ``patience`` observations
    ``plateau/<monitor>/since_progress``  observations since the trend was last above ``min_delta``
    ====================================  ===========================================================================

    Args:
        monitor: The logged name, such as ``effective_rank/last`` or that of a loss.
        min_delta: Change per ``patience`` observations that counts as progress. Must be positive: a flat series
            cannot be distinguished from one that rises arbitrarily slowly.
        patience: Number of observations in which ``min_delta`` has to be gained.
        mode: "max" stops when the series no longer rises (a falling one has a plateau, too), "min" when it no longer
            falls, "any" when it does neither.
        warmup_steps: Values at steps below this are not observed.
        smoothing: Standard deviation of the noise to be averaged out, in units of ``min_delta``. Where it makes
            the window longer than 1.5 ``patience``, the window grows with its 2/3rd power.
        verbose: Print one line at the stop: why, at which step and at which value.
        on_error: ``"warn"``: an error in a run is warned about once, and training goes on; ``"raise"``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from matent_callbacks.transformers import PlateauStopping
        >>> stopping = PlateauStopping("eval_effective_rank/last", min_delta=0.5, patience=5, mode="any")
    """

    @needs_arguments
    def __init__(
        self,
        monitor: str,
        *,
        min_delta: float,
        patience: int,
        mode: Literal["max", "min", "any"] = "max",
        warmup_steps: int = 0,
        smoothing: float = 0.45,
        verbose: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        new_observer = partial(
            PlateauObserver,
            monitor,
            min_delta=min_delta,
            patience=patience,
            mode=mode,
            warmup_steps=warmup_steps,
            smoothing=smoothing,
            verbose=verbose,
        )
        super().__init__(new_observer, on_error)


class CollapseAlarm(ObservingCallback):
    """Raises an alarm when a logged value has fallen far below its level and does not come back.

    Each log record with the value is one observation, whatever logs it. The decision is
    :class:`~matent_callbacks.CollapseDetector`'s, which is not deceived by the dip of a healthy run in its first steps.
    An alarm is one line, in a warning and among the alerts of W&B, and is not raised again until the value has
    recovered. The observations are in every checkpoint, so a resumed run raises the alarms of an uninterrupted one.

    ====================  ===========================================================================================
    ``collapse/<key>``    1 in the record in which the alarm is raised, 0 in that of a recovery
    ====================  ===========================================================================================

    Args:
        monitor: A logged name or a glob; each matching name is watched separately.
        floor: Share of the reference below which the series has to lie; between 0 and 1.
        patience: Number of observations that have to lie there.
        relative_to: The reference. ``"max"``: the highest level so far, a level being the first observation or the
            lower one of two neighbours, so that a single spike does not count; ``"first"``: the first observation; or
            a number above 0. A reference that is not above 0 never gives an alarm.
        warmup_steps: Values at steps below this are not observed.
        action: What an alarm does beyond its warning: ``"warn"``: nothing; ``"stop"``: it ends the training; or a
            function that is called on every rank with the alarm, which has ``key``, ``step``, ``value``,
            ``reference`` and ``message``.
        checkpoint: Save a checkpoint at an alarm, before training stops.
        on_error: ``"warn"``: an error in a run is warned about once, and training goes on; ``"raise"``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback
        >>> callbacks = [MatrixEntropyCallback(every_n_steps=10, layers="all"), CollapseAlarm(action="stop")]
        >>> # Trainer(..., callbacks=callbacks).train()
    """

    def __init__(
        self,
        monitor: str = "effective_rank/*",
        *,
        floor: float = 0.25,
        patience: int = 10,
        relative_to: Literal["max", "first"] | float = "max",
        warmup_steps: int = 0,
        action: Action = "warn",
        checkpoint: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        new_observer = partial(
            CollapseObserver,
            monitor,
            floor=floor,
            patience=patience,
            relative_to=relative_to,
            warmup_steps=warmup_steps,
            action=action,
            checkpoint=checkpoint,
        )
        super().__init__(new_observer, on_error)


def _names(state: TrainerState) -> set[str]:
    return {key for record in state.log_history for key in record}
