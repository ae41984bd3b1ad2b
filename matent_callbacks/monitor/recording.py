"""Records the hidden states of all layers during one reading, alone or together with the ranks that hold parts of them.

Where several ranks hold parts of the same sequences they communicate in the middle of a forward, so none of them may
leave the others waiting, whatever fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.reduction import agreed_failures, is_distributed
from matent_callbacks.accumulate.split_sequences import SplitSequences, agreed
from matent_callbacks.capture.sharded import Share, is_sharded, share_of
from matent_callbacks.functional._tokens import check_hidden_states


class Recording:
    """Adds the hidden states of forward passes to the statistics of their layers.

    Args:
        accumulators: The statistics of each layer.
        on_error: ``"raise"``, or ``"warn"``: warn once per layer, and leave that layer out from then on.
        process_group: The ranks whose tokens belong together; ``None``: all.
        context_group: Those of them that hold parts of the same sequences; ``None``: no rank holds parts.
    """

    def __init__(
        self,
        accumulators: Mapping[str, LayerAccumulator],
        on_error: Literal["raise", "warn"],
        process_group: dist.ProcessGroup | None,
        context_group: dist.ProcessGroup | None,
    ) -> None:
        if on_error not in ("raise", "warn"):
            raise ValueError(f"`on_error` must be 'raise' or 'warn', got {on_error!r}.")
        self.accumulators = dict(accumulators)
        self.failed: set[str] = set()
        """Layers that failed on this rank, or on another as far as this one knows."""
        self._failed_everywhere: set[str] = set()
        """Layers that failed, as every rank knows: no rank makes a collective call for them."""
        self._on_error = on_error
        self._members = None if process_group is None else dist.get_process_group_ranks(process_group)
        self._context = [context_group] if context_group is not None and is_distributed(context_group) else []
        self._is_awaited = False

    @property
    def has_whole_sequences(self) -> bool:
        """Whether each sequence is that of the model's inputs on this rank."""
        return not self._context

    def begin(self) -> None:
        """Agree on whether all ranks have their hooks in place; without them a rank would miss the collective calls."""
        device = next(iter(self.accumulators.values())).device
        for group in self._context:
            if agreed_failures([all(layer in self.failed for layer in self.accumulators)], device, group)[0]:
                self._failed_everywhere |= set(self.accumulators)

    def fail(self, layers: set[str]) -> set[str]:
        """Leave out layers that failed on any rank, as every rank knows; return those that this rank did not know."""
        new = layers - self.failed
        self._failed_everywhere |= layers
        self.failed |= layers
        return new

    def discard(self, layer: str) -> None:
        """Forget what was recorded of a layer."""
        self.accumulators[layer].discard()

    def record(self, layer: str, hidden_states: Tensor | None, mask: Tensor | None, vectors: Tensor | None) -> None:
        """Add the tokens of one forward pass. ``vectors`` are only used where this rank holds whole sequences."""
        accumulator, failed = self.accumulators[layer], layer in self.failed
        if is_sharded(hidden_states):
            share = share_of(hidden_states, mask, self._members)
        elif self._context:
            share = Share(lambda: check_hidden_states(hidden_states, mask), [], [], counts=True)
        else:
            if not failed:
                with part("accumulate"):
                    accumulator.update(hidden_states, mask, vectors)
            return
        communicating, sharing = [*share.communicating, *self._context], [*share.sharing, *self._context]
        if not communicating:
            if share.counts and not failed:
                accumulator.update(*share.local())
            return
        if layer in self._failed_everywhere:
            return

        def prepare() -> SplitSequences:
            if failed:
                raise RuntimeError("it failed before.")
            states = hidden_states.to_local() if is_sharded(hidden_states) else hidden_states
            states, _ = check_hidden_states(states, None)
            width = states.shape[-1] if hidden_states is None else hidden_states.shape[-1]
            return accumulator.split_sequences(len(states), width, share.local, sharing, device=states.device)

        self._is_awaited = False
        try:
            sequences = agreed(prepare, communicating, accumulator.device)
        except Exception:
            self._failed_everywhere.add(layer)
            raise
        if share.counts:
            with part("accumulate"):
                accumulator.update_split(sequences)
        else:
            share.local()

    @contextmanager
    def guarded(self, layer: str) -> Iterator[None]:
        """Handle an error in reading ``layer``, or in what all layers need if it is the name of none."""
        self._is_awaited = True
        try:
            yield
        except Exception as error:
            if layer in self.accumulators:
                self._report_nothing(layer)
            message = f"Reading layer {layer!r} failed: {error}"
            if self._on_error == "raise":
                raise RuntimeError(message) from error
            failing = {layer} if layer in self.accumulators else set(self.accumulators)
            if not failing <= self.failed:
                warnings.warn(f"{message} It is left out from here on; training goes on.", stacklevel=2)
            self.failed |= failing

    def _report_nothing(self, layer: str) -> None:
        """Let the ranks that wait for this one, if any, know that it has nothing to record."""
        if not self._is_awaited or not self._context or layer in self._failed_everywhere:
            return
        self._is_awaited = False
        self._failed_everywhere.add(layer)
        with suppress(Exception):
            agreed(_nothing, self._context, self.accumulators[layer].device)


def part(name: str) -> AbstractContextManager[Any]:
    """Name the part of a measurement that is done inside, for a profile of the run."""
    # Costs as much as a small operation even if nobody looks.
    return record_function(f"matent_callbacks: {name}") if torch._C._autograd._profiler_enabled() else nullcontext()


def _nothing() -> SplitSequences:
    raise RuntimeError("there is nothing to record.")
