"""Readings that are computed in the background, and logged under the step that they are of."""

from __future__ import annotations

from collections.abc import Callable

from transformers import Trainer, TrainerState


class LateReading:
    """At most one reading that is still being worked on, and the step whose log record it will be."""

    def __init__(self) -> None:
        self._step = 0
        self._epoch: float | None = None
        self._finish: Callable[[], dict[str, float]] | None = None

    def begin(self, state: TrainerState, finish: Callable[[], dict[str, float]]) -> None:
        """Keep what will give the numbers of the step that the Trainer is at."""
        self._step, self._epoch, self._finish = state.global_step, state.epoch, finish

    def log(self, trainer: Trainer) -> bool:
        """Wait for the numbers and log them under their step; whether there were any."""
        finish, self._finish = self._finish, None
        values = finish() if finish is not None else {}
        if not values:
            return False
        state, control = trainer.state, trainer.control
        # A log record has the step that the state is at, and writing one takes back that another is to be written.
        now = state.global_step, state.epoch, control.should_log
        state.global_step, state.epoch = self._step, self._epoch
        try:
            # Not the `log` of a kind of Trainer that adds numbers of its own: those are of another step.
            Trainer.log(trainer, values)
        finally:
            state.global_step, state.epoch, trainer.control.should_log = now
        return True
