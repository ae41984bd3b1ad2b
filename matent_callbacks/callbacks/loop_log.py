"""Logs what a loop of one's own measures: values, pictures, what was measured, and which charts W&B draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.loggers import log_settings, takers, to_each, wandb_runs
from matent_callbacks.callbacks.run_monitor import Logged, RunMonitor


class LoopLog:
    """Sends what a :class:`RunMonitor` returns to what :class:`~matent_callbacks.LoopMonitor` takes as ``log``.

    Raises:
        TypeError: If nothing can be logged with ``log``.
    """

    def __init__(self, log: Any, run: RunMonitor, guard: Guard) -> None:
        if not (log is None or callable(log) or any(hasattr(log, name) for name in ("log_dict", "add_scalar", "log"))):
            raise TypeError(
                "`log` must be a function of values and step, an Accelerator, Fabric, a run of W&B or a SummaryWriter, "
                f"got {type(log).__name__}."
            )
        self._log = log
        self._run = run
        self._guard = guard
        self._has_settings = False

    def values(self, logged: Logged) -> None:
        """Log values under their steps, and the pictures that are due."""
        for step, values in logged.items():
            if not self._has_settings:
                self._has_settings = True
                self._settings()
            with self._guard("the log of the values"):
                if values and self._log is not None:
                    _log_values(self._log, values, step)
            with self._guard("the choice of charts"):
                self._run.hide_charts(values, wandb_runs(self._loggers()))
            self._run.remember(step, values)
            self.pictures(step)

    def pictures(self, step: int, *, last: bool = False) -> None:
        """Log the pictures, if they are due or the run has ended (``last``)."""
        with self._guard("pictures"):
            if self._run.has_pictures and (found := takers(self._loggers())):
                to_each(found, self._run.pictures(last=last), step, self._guard)

    def _settings(self) -> None:
        with self._guard("what is measured among the settings of the run"):
            for logger in self._loggers():
                log_settings(logger, self._run.settings)

    def _loggers(self) -> list[Any]:
        """What is behind ``log`` on this rank: loggers, trackers, a run, a writer."""
        log = self._log
        if not getattr(log, "is_global_zero", True):
            return []
        return list(getattr(log, "loggers", None) or getattr(log, "trackers", None) or [log])


def _log_values(log: Any, values: Mapping[str, float], step: int) -> None:
    if hasattr(log, "log_dict"):  # Fabric
        log.log_dict(values, step=step)
    elif hasattr(log, "add_scalar"):  # TensorBoard
        for key, value in values.items():
            log.add_scalar(key, value, step)
    elif hasattr(log, "log"):  # Accelerator, a run of W&B
        log.log(dict(values), step=step)
    else:
        log(dict(values), step)
