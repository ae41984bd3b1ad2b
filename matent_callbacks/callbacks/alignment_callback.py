"""The base class of both frameworks' ``AlignmentCallback``: arguments and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch.distributed as dist

from matent_callbacks.accumulate.reduction import check_groups
from matent_callbacks.callbacks.alignment_measurement import SUMMARIZED_BY_MAXIMUM, AlignmentMeasurement
from matent_callbacks.callbacks.alignment_reading import Stages
from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.measure_alignment import measure_alignment
from matent_callbacks.callbacks.measurement import check_every_n_steps
from matent_callbacks.callbacks.probe import first_batch, prefix_of


@with_arguments_of(measure_alignment)
class SharedAlignmentCallback:
    """Arguments of ``AlignmentCallback`` and their checks; the adapters translate events and log.

    Args:
        every_n_steps: Optimizer steps between two readings.
        probe: One batch of pairs (a mapping of the model's keyword arguments) or a list of them; ``None``: the first
            ``num_pairs`` of the evaluation data, or of the training data, through the run's own collator. Or a mapping
            of several named probes; each name is put before the names of its values.
        num_pairs: How many pairs ``probe=None`` takes.
        during_eval: Also measure at the end of each evaluation.
        prog_bar: Show the values in the progress bar.
        name: Prefix of the names of all values, ``<name>/alignment/...``: for a second callback.
        process_group: The ranks whose pairs belong together; ``None``: those of the data-parallel dimensions of the
            Trainer's device mesh, or else all.
        context_group: Those of them that hold parts of the same sequences in every forward of the language model
            (Ulysses, ring attention). Each needs the same probe and runs its part of it. ``None``: each runs the whole
            probe. Cannot be combined with ``stages``; towers of a dual encoder always run whole sequences.
        on_error: ``"warn"``: an error later in a run is warned about once, and training goes on; ``"raise"``.

    Raises:
        ValueError: Here for an argument out of range; when training begins for a probe or a model that cannot be read,
            and for a second callback that would log the same names.
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
        name: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        check_every_n_steps(every_n_steps)
        check_groups(process_group, context_group)
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be at least 2, got {num_pairs}.")
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self.name = name
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
            prefix=prefix_of(name),
            group=process_group,
            context_group=context_group,
        )
        self.start_over()

    def start_over(self) -> None:
        super().start_over()  # type: ignore[misc]  # that of the adapter
        self._alignment = self._alignment.renewed()

    @property
    def summarized_by_maximum(self) -> list[str]:
        """The names whose maximum over the run belongs in a run's summary, beside their last value."""
        return [f"{prefix}{key}" for prefix in self._alignment.prefixes for key in SUMMARIZED_BY_MAXIMUM]

    def first_pairs(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> Any:
        """Return the probe to use where none was given."""
        return first_batch(dataset, collate, self._num_pairs)

    def join(self, trainer: Any, callbacks: Iterable[Any]) -> None:
        """Find the ranks whose pairs belong together.

        Raises:
            ValueError: If another of ``callbacks`` logs under the same names.
        """
        with self.guard("the choice of ranks by the Trainer's device mesh"):
            self._alignment.choose_group(trainer)
        for other in callbacks:
            if not isinstance(other, SharedAlignmentCallback) or other is self:
                continue
            if set(self._alignment.prefixes) & set(other._alignment.prefixes):
                raise ValueError(
                    "Two `AlignmentCallback`s would log the same values, one over the other: give one of them a "
                    f"`name`; got `name` {other.name!r} and {self.name!r}."
                )
