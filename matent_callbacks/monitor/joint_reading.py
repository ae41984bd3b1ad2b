"""Reads a layer together with the ranks that hold other parts of its hidden states, and leaves none of them waiting."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.accumulate.reduction import agreed_failures, is_distributed
from matent_callbacks.accumulate.split_sequences import SplitSequences, agreed
from matent_callbacks.capture.sharded import Share, is_sharded, share_of
from matent_callbacks.functional._tokens import check_hidden_states


class JointReading:
    """Records hidden states of this rank, with collective calls where other ranks hold parts of the same sequences.

    Args:
        process_group: The ranks whose tokens belong together; ``None``: all.
        context_group: Those of them that hold parts of the same sequences; ``None``: no rank holds parts.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, context_group: dist.ProcessGroup | None) -> None:
        self.failed: set[str] = set()
        """Layers that failed, as every rank knows: no rank makes a collective call for them."""
        self._members = None if process_group is None else dist.get_process_group_ranks(process_group)
        self._context = [context_group] if context_group is not None and is_distributed(context_group) else []
        self._met = True

    @property
    def has_whole_sequences(self) -> bool:
        """Whether each sequence is that of the model's inputs on this rank."""
        return not self._context

    def begin(self, accumulators: dict[str, LayerAccumulator], failed: Collection[str]) -> None:
        """Agree on whether all ranks have their hooks in place; without them a rank would miss the collective calls."""
        device = next(iter(accumulators.values())).device
        for group in self._context:
            if agreed_failures([all(layer in failed for layer in accumulators)], device, group)[0]:
                self.failed |= set(accumulators)

    def record(
        self,
        layer: str,
        accumulator: LayerAccumulator,
        hidden_states: Tensor | None,
        mask: Tensor | None,
        vectors: Tensor | None,
        *,
        failed: bool,
    ) -> None:
        """Add the tokens of one forward pass; ``failed``: this rank failed to do so before.

        ``vectors`` are only used where this rank holds whole sequences.
        """
        if is_sharded(hidden_states):
            share = share_of(hidden_states, mask, self._members)
        elif self._context:
            share = Share(lambda: check_hidden_states(hidden_states, mask), [], [], counts=True)
        else:
            if not failed:
                accumulator.update(hidden_states, mask, vectors)
            return
        meeting, splitting = [*share.meeting, *self._context], [*share.splitting, *self._context]
        if not meeting:
            if share.counts and not failed:
                accumulator.update(*share.local())
            return
        if layer in self.failed:
            return

        def prepare() -> SplitSequences:
            if failed:
                raise RuntimeError("it failed before.")
            states = hidden_states.to_local() if is_sharded(hidden_states) else hidden_states
            states, _ = check_hidden_states(states, None)
            width = states.shape[-1] if hidden_states is None else hidden_states.shape[-1]
            return accumulator.parts(len(states), width, share.local, splitting, device=states.device)

        self._met = True
        try:
            parts = agreed(prepare, meeting, accumulator.device)
        except Exception:
            self.failed.add(layer)
            raise
        if share.counts:
            accumulator.update_by_parts(parts)
        else:
            share.local()

    def expect(self) -> None:
        """Note that a layer is about to be recorded; if that fails before it begins, :meth:`excuse` must be called."""
        self._met = False

    def excuse(self, layer: str, accumulator: LayerAccumulator) -> None:
        """Tell the ranks that wait for this one, if any, that there is nothing to record."""
        if self._met or not self._context or layer in self.failed:
            return
        self._met = True
        self.failed.add(layer)
        with suppress(Exception):
            agreed(_nothing, self._context, accumulator.device)


def _nothing() -> SplitSequences:
    raise RuntimeError("there is nothing to record.")
