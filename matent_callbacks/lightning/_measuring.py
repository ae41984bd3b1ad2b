"""Puts readings of any kind into Lightning's logs."""

from __future__ import annotations

import warnings
from typing import Any

from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.lightning._trainer import (
    GuardedCallback,
    log,
    log_to_loggers,
    logging_step,
    publish,
    takes_names_with_a_loader,
)


class MeasuringCallback(GuardedCallback):
    """Knows which optimizer steps are due, and logs what was read at them."""

    every_n_steps: int
    steps_until_logged: int
    """The number of steps until values are logged; those from the background are logged late."""
    prog_bar: bool

    def start_over(self) -> None:
        self.off = False
        self._last_step = 0
        self._logged_step = -1

    def step_values(self, trainer: Any, pl_module: Any, *, due: bool, last: bool) -> dict[str, float] | None:
        """Return the readings after an optimizer step, ``due`` at an interval, ``last`` if none follows; or None."""
        raise NotImplementedError

    def was_logged(self, trainer: Any, values: dict[str, float], *, step: int) -> None:
        """Called when readings are in the loggers, at ``step`` of their x axis."""

    def log_evaluation(
        self, trainer: Any, pl_module: Any, prefix: str, values: dict[str, float], *, loader: int = 0, loaders: int = 1
    ) -> dict[str, float]:
        """Log the readings of one of several loaders; returns them under their whole names."""
        suffix = f"/dataloader_idx_{loader}" if loaders > 1 else ""
        named = {f"{prefix}_{key}{suffix}": value for key, value in values.items()}
        with self.guard("the log of an evaluation"):
            if suffix and not takes_names_with_a_loader(trainer):
                publish(trainer, named, self.guard)
            else:
                log(pl_module, named, prog_bar=self.prog_bar, add_dataloader_idx=False)
        return named

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.off = trainer.barebones
        if self.off:
            warnings.warn("Trainer(barebones=True) logs nothing, so no readings are taken.", stacklevel=2)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_step, self._logged_step = trainer.global_step, -1

    @guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.off or trainer.global_step == self._last_step:
            return
        due = trainer.global_step // self.every_n_steps > self._last_step // self.every_n_steps
        self._last_step = trainer.global_step
        last = 0 <= trainer.max_steps <= trainer.global_step
        values = self.step_values(trainer, pl_module, due=due, last=last)
        if values is None:
            return
        # Also where the reading failed: the ranks measure together or not at all.
        self._logged_step = trainer.global_step
        # Only every `log_every_n_steps` does Lightning pass on to the loggers what `self.log` was given last: a reading
        # in between would be lost, or logged at a later step. So it goes to the loggers directly.
        if values:
            with self.guard("`trainer.callback_metrics`"):
                log(pl_module, values, on_step=True, on_epoch=False, prog_bar=self.prog_bar, logger=False)
            log_to_loggers(trainer, values, self.guard)
            self.was_logged(trainer, values, step=logging_step(trainer))

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if self.off or not ends or self._logged_step == trainer.global_step:
            return
        values = self.step_values(trainer, pl_module, due=False, last=True)
        if values:
            publish(trainer, values, self.guard)
            self.was_logged(trainer, values, step=logging_step(trainer))
