"""What both frameworks' ``AlignmentCallback`` take and keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from matent_callbacks.callbacks.alignment_measurement import AlignmentMeasurement, measure_alignment
from matent_callbacks.callbacks.alignment_reading import Stages
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import Guard, GuardedHooks
from matent_callbacks.callbacks.measurement import check_every_n_steps
from matent_callbacks.callbacks.probe import first_batch


@with_arguments_of(measure_alignment)
class SharedAlignmentCallback(GuardedHooks):
    """Arguments of ``AlignmentCallback`` and their checks; the adapters translate events and log.

    Args:
        every_n_steps: Optimizer steps between two readings.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; ``None``: the first
            ``num_pairs`` of the evaluation data, or of the training data, through the run's own collator.
        num_pairs: How many pairs ``probe=None`` takes.
        during_eval: Also measure at the end of each evaluation.
        prog_bar: Show the values in the progress bar.
        on_error: ``"warn"``: what goes wrong later in a run is said once and training goes on; ``"raise"``.

    Raises:
        ValueError: Here for an argument out of range; when training begins for a probe or a model that cannot be read.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        probe: Any = None,
        num_pairs: int = 16,
        during_eval: bool = True,
        basis: Literal["effective_rank", "entropy"] = "effective_rank",
        metrics: str | Iterable[str] = "effective_rank",
        pair_measures: Iterable[str] | None = None,
        stages: Stages | None = None,
        towers: tuple[str, str] | None = None,
        k: int = 10,
        alpha: float = 1.0,
        prog_bar: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        check_every_n_steps(every_n_steps)
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self._num_pairs = num_pairs
        self._alignment = AlignmentMeasurement(
            probe=probe,
            basis=basis,
            metrics=metrics,
            pair_measures=pair_measures,
            stages=stages,
            towers=towers,
            k=k,
            alpha=alpha,
        )
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._alignment = self._alignment.renewed()

    def first_pairs(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> Any:
        """The probe where none was given."""
        return first_batch(dataset, collate, self._num_pairs)
