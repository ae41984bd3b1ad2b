"""Raises an alarm in a Lightning Trainer when a logged value collapses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from matent_callbacks.accumulate.reduction import is_distributed
from matent_callbacks.callbacks.collapse_alarm import Alarm, SharedCollapseAlarm
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.lightning._logged_values import ObservingCallback
from matent_callbacks.lightning._loggers import alert
from matent_callbacks.lightning._trainer import publish


@with_arguments_of(SharedCollapseAlarm)
class CollapseAlarm(SharedCollapseAlarm, ObservingCallback):
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

    Example:
        >>> from matent_callbacks.lightning import CollapseAlarm, MatrixEntropyCallback
        >>> callbacks = [MatrixEntropyCallback(every_n_steps=10, layers="all"), CollapseAlarm(action="stop")]
        >>> # Trainer(callbacks=callbacks).fit(module, data)
    """

    def look(self, trainer: Any) -> None:
        metrics = trainer.callback_metrics
        new = self.logged.new(metrics, self.watched(metrics))
        if not new:
            return
        alarms: list[Alarm] = []
        recovered: list[str] = []
        with self.guard("the observation of values"):
            alarms, recovered = self.observe(trainer.global_step, {key: float(value) for key, value in new.items()})
        # Ranks that log different values, or fail to observe one, must not stop or save at different steps.
        if trainer.strategy.reduce_boolean_decision(bool(alarms), all=False):
            alarms = _of_all_ranks(alarms)
            trainer.should_stop |= self.action == "stop"
        publish(trainer, self.note(alarms, recovered), self.guard)
        if alarms and self.checkpoint:
            trainer.save_checkpoint(_folder(trainer) / f"collapse-step={trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            self.tell(alarms, lambda title, text: alert(trainer, self.guard, title, text))
        self.act(alarms)


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
