"""Which of the values in a Lightning Trainer's ``callback_metrics`` were logged since they were last looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from matent_callbacks.lightning._trainer import GuardedCallback


class LoggedValues:
    """``callback_metrics`` keeps a value until it is logged again; this tells the new ones.

    The tensors that were seen are held, so one that was logged since lies elsewhere in memory.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def new(self, metrics: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of ``keys`` that were logged since the last call."""
        found = {key: metrics[key] for key in keys if key in metrics and not self._is_old(key, metrics[key])}
        self._seen |= found
        return found

    def _is_old(self, key: str, value: Tensor) -> bool:
        return key in self._seen and value.data_ptr() == self._seen[key].data_ptr()


class ObservingCallback(GuardedCallback):
    """Looks at what was logged wherever something may have been, whatever logged it."""

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
