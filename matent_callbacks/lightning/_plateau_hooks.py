"""Stops a Lightning Trainer when a logged value has stopped changing."""

from __future__ import annotations

from typing import Any

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.plateau_stopping import SharedPlateauStopping
from matent_callbacks.lightning._logged_values import ObservingCallback
from matent_callbacks.lightning._trainer import publish


@with_arguments_of(SharedPlateauStopping)
class PlateauStopping(SharedPlateauStopping, ObservingCallback):
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

    Example:
        >>> from matent_callbacks.lightning import PlateauStopping
        >>> stopping = PlateauStopping("val_effective_rank/last", min_delta=0.5, patience=5, mode="any")
    """

    def look(self, trainer: Any) -> None:
        value = self.logged.new(trainer.callback_metrics, [self.monitor]).get(self.monitor)
        if value is None:
            return
        stop = False
        with self.guard("the observation of a value"):
            stop = self.observe(trainer.global_step, float(value))
        # Ranks that log different values, or fail to observe one, must not stop at different steps.
        stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        stops_now = stop and not trainer.should_stop
        trainer.should_stop |= stop
        publish(trainer, self.logged_values(), self.guard)
        if stops_now and self.verbose and trainer.is_global_zero:
            self.say_stop()
