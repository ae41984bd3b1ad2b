"""Stops a Lightning Trainer at a plateau of a logged value, and raises an alarm when one collapses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.reduction import is_distributed
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.observers import (
    Action,
    Alarm,
    CollapseObserver,
    Observer,
    PlateauObserver,
    call_action,
    needs_arguments,
)
from matent_callbacks.lightning._trainer import GuardedCallback, alert, publish


class ObservingCallback(GuardedCallback):
    """Observes a value each time it is logged, and warns if it is missing where it would have been due."""

    def __init__(self, new_observer: Callable[[], Observer], on_error: Literal["warn", "raise"]) -> None:
        self.guard = Guard(type(self).__name__, on_error)
        self._new_observer = new_observer
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self.observer = self._new_observer()
        self._last_step = 0
        # `callback_metrics` keeps each value until it is logged again. What was observed is kept alive, so that a
        # value that was logged since has another address.
        self._observed: dict[str, Tensor] = {}

    @property
    def monitor(self) -> str:
        """The name or glob that is observed."""
        return self.observer.monitor

    @guarded
    def state_dict(self) -> dict[str, Any]:
        return self.observer.state_dict()

    @guarded
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.observer.load_state_dict(state_dict)

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        self.observer.unlogged.begin(trainer.global_step)

    @guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._observe(trainer)
        # Until the batch before this one: all callbacks have had their turn.
        unlogged, step, self._last_step = self.observer.unlogged, self._last_step, trainer.global_step
        recorded = step > unlogged.start
        unlogged.check(lambda: trainer.callback_metrics, step, self.callbacks_of_trainer, recorded=recorded)

    @guarded
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._observe(trainer)
            self.observer.unlogged.was_evaluated = True

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._observe(trainer)

    @guarded
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.observer.unlogged.at_end(trainer.callback_metrics)

    def _observe(self, trainer: Any) -> None:
        """Called after every event at which anything may have logged a value."""
        new = self._new_values(trainer.callback_metrics)
        if not new:
            return
        alarms: list[Alarm] = []
        with self.guard("the observation of values"):
            alarms = self.observer.observe(trainer.global_step, {key: float(value) for key, value in new.items()})
        # Ranks that log different values, or fail to observe one, must not stop or save at different steps.
        if trainer.strategy.reduce_boolean_decision(bool(alarms), all=False):
            alarms = _of_all_ranks(alarms)
        stops = bool(alarms) and self.observer.action == "stop"
        stops_now = stops and not trainer.should_stop
        trainer.should_stop |= stops
        publish(trainer, self.observer.logged_values(alarms), self.guard)
        if alarms and self.observer.saves_checkpoint:
            trainer.save_checkpoint(_folder(trainer) / f"collapse-step={trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            self.observer.report(alarms, partial(alert, trainer, self.guard), stops_now=stops_now)
        call_action(self.observer, alarms, self.guard)

    def _new_values(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the watched values that were logged since the last call."""
        new = {
            key: metrics[key]
            for key in self.observer.watched(metrics)
            if key not in self._observed or metrics[key].data_ptr() != self._observed[key].data_ptr()
        }
        self._observed |= new
        return new


class PlateauStopping(ObservingCallback):
    """Stops training when a logged value has demonstrably stopped changing in its direction.

    Each time the value is logged is one observation, whatever logs it: the training loss, a validation metric, a
    reading of ``MatrixEntropyCallback``. The decision is :class:`~matent_callbacks.PlateauDetector`'s. Its history is
    in every checkpoint, so a resumed run stops where an uninterrupted one does; if its settings have changed, the new
    ones judge the values of before, too. A value is seen one batch late if it is logged by a callback further back in
    the list, or by the module's ``on_train_epoch_end``.

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
        >>> from matent_callbacks.lightning import PlateauStopping
        >>> stopping = PlateauStopping("val_effective_rank/last", min_delta=0.5, patience=5, mode="any")
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

    Each time the value is logged is one observation, whatever logs it. The decision is
    :class:`~matent_callbacks.CollapseDetector`'s, which is not deceived by the dip of a healthy run in its first steps.
    An alarm is one line, in a warning and among the alerts of W&B, and is not raised again until the value has
    recovered. The observations are in every checkpoint, so a resumed run raises the alarms of an uninterrupted one. A
    value is seen one batch late if it is logged by a callback further back in the list.

    ====================  ===========================================================================================
    ``collapse/<key>``    1 at the step at which the alarm is raised, 0 at that of a recovery
    ====================  ===========================================================================================

    With ``checkpoint=True`` a checkpoint is saved as ``collapse-step=<step>.ckpt``, beside those of ``ModelCheckpoint``
    or else in the Trainer's ``default_root_dir``.

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
        >>> from matent_callbacks.lightning import CollapseAlarm, MatrixEntropyCallback
        >>> callbacks = [MatrixEntropyCallback(every_n_steps=10, layers="all"), CollapseAlarm(action="stop")]
        >>> # Trainer(callbacks=callbacks).fit(module, data)
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


def _of_all_ranks(alarms: list[Alarm]) -> list[Alarm]:
    """Return one alarm per name, that of the lowest rank that raised it, so that all ranks act on the same ones."""
    gathered = [alarms]
    if is_distributed():
        gathered = [alarms] * dist.get_world_size()
        dist.all_gather_object(gathered, alarms)
    first: dict[str, Alarm] = {}
    for alarm in (alarm for own in gathered for alarm in own):
        first.setdefault(alarm.key, alarm)
    return list(first.values())


def _folder(trainer: Any) -> Path:
    """Return the folder of this run's checkpoints."""
    own = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(own or trainer.default_root_dir)
