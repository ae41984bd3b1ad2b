"""Follows the records of a Hugging Face Trainer, to tell of a monitored name that is not among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.unlogged import Unlogged, had_first_readings
from matent_callbacks.transformers._attach import AttachedCallback


class ObservingCallback(AttachedCallback):
    """Tells of a name that is not logged when its first record would have been due; :attr:`unlogged` knows which."""

    order = 1

    unlogged: Unlogged

    def warn_if_never_logged(self, logged: Iterable[str]) -> None:
        """Called when training ends, with all names that were logged."""
        raise NotImplementedError

    def start_over(self) -> None:
        super().start_over()
        self._start = 0
        self._evaluated = self._recorded = self._read = False

    def begin(self, state: TrainerState) -> None:
        self._start = state.global_step

    @guarded
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated = True

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Only now: an evaluation on several data sets makes several records, and so may several callbacks.
        if self.unlogged.settled or state.global_step == self._start:
            return
        if self._evaluated:
            self._evaluated = False
            self.unlogged.after_evaluation(_names(state))
        if not self._read and had_first_readings(self.callbacks_of_trainer, self._start, state.global_step):
            self._read = True
            self.unlogged.after_readings(_names(state))
        if not self._recorded and state.log_history and state.log_history[-1].get("step", 0) > self._start:
            self._recorded = True
            self.unlogged.after_record(_names(state))

    @guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.warn_if_never_logged(_names(state))


def _names(state: TrainerState) -> set[str]:
    return {key for record in state.log_history for key in record}
