"""Finds the values in a Lightning Trainer's ``callback_metrics`` that were logged since the last look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

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
    """Calls :meth:`look` after every event at which anything may have logged a value."""

    def start_over(self) -> None:
        super().start_over()
        self.logged = LoggedValues()

    def look(self, trainer: Any) -> None:
        """Called where values may have been logged."""
        raise NotImplementedError

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.look(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)
