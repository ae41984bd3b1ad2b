"""Finds the values in a Lightning Trainer's ``callback_metrics`` that were logged since the last look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.unlogged import Unlogged, had_first_readings
from matent_callbacks.lightning._trainer import GuardedCallback


class LoggedValues:
    """Finds new values in ``callback_metrics``, which keeps each value until it is logged again.

    The tensors that were seen are kept alive, so one that was logged since has another address.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def new(self, metrics: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Tensor]:
        """Return the values of those ``keys`` that were logged since the last call."""
        found = {key: metrics[key] for key in keys if key in metrics and not self._is_old(key, metrics[key])}
        self._seen |= found
        return found

    def _is_old(self, key: str, value: Tensor) -> bool:
        return key in self._seen and value.data_ptr() == self._seen[key].data_ptr()


class ObservingCallback(GuardedCallback):
    """Calls :meth:`look` after every event at which anything may have logged a value.

    A name that is not logged when its first record would have been due is told; :attr:`unlogged` knows which.
    """

    unlogged: Unlogged

    def warn_if_never_logged(self, logged: Iterable[str]) -> None:
        """Called when training ends, with all names that were logged."""
        raise NotImplementedError

    def start_over(self) -> None:
        super().start_over()
        self.logged = LoggedValues()
        self._begin_at(0)

    def _begin_at(self, step: int) -> None:
        self._start = self._last_step = step
        self._evaluated = self._recorded = self._read = False

    def look(self, trainer: Any) -> None:
        """Called where values may have been logged."""
        raise NotImplementedError

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_at(trainer.global_step)

    @guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer)
        if not self.unlogged.settled:
            self._tell_of_unlogged(trainer)

    @guarded
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.look(trainer)
            self._evaluated = True

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)

    @guarded
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.warn_if_never_logged(trainer.callback_metrics)

    def _tell_of_unlogged(self, trainer: Any) -> None:
        """Tell of a name that was not logged in a batch before this one, when all callbacks have had their turn."""
        names = trainer.callback_metrics
        if self._evaluated:
            self._evaluated = False
            self.unlogged.after_evaluation(names)
        if not self._read and had_first_readings(self.callbacks_of_trainer, self._start, self._last_step):
            self._read = True
            self.unlogged.after_readings(names)
        if not self._recorded and self._last_step > self._start:
            self._recorded = True
            self.unlogged.after_record(names)
        self._last_step = trainer.global_step
