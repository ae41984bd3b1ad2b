"""Logs readings that are computed in the background under the step at which they were taken."""

from __future__ import annotations

from collections.abc import Callable

from transformers import Trainer, TrainerState

from matent_callbacks.transformers._log_records import log_record


class LateReading:
    """At most one reading that is still being computed, and the step that it will be logged under."""

    def __init__(self) -> None:
        self._step = 0
        self._epoch: float | None = None
        self._finish: Callable[[], dict[str, float]] | None = None

    def begin(self, state: TrainerState, finish: Callable[[], dict[str, float]]) -> None:
        """Keep ``finish``, which waits for the numbers, with the step that the Trainer is at."""
        self._step, self._epoch, self._finish = state.global_step, state.epoch, finish

    def log(self, trainer: Trainer) -> bool:
        """Wait for the numbers and log them under their step; return whether there were any."""
        finish, self._finish = self._finish, None
        values = finish() if finish is not None else {}
        if not values:
            return False
        log_record(trainer, values, step=self._step, epoch=self._epoch)
        return True
