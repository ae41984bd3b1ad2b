"""Hidden states that are DTensors, spread over a mesh of ranks: which part of them this rank reads, and with whom.

Tokens stay where they are as far as that goes. What is spread over the batch is read as it is, as in data parallelism;
what is spread over tokens as well, together with the ranks that hold the other tokens of each sequence. What is spread
over features, or a sum that is still to be made, is exchanged so that each rank has some tokens as a whole, which sends
and takes no more than one share of the activations. What every rank has is read by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Share(NamedTuple):
    """What one rank reads of hidden states."""

    local: Callable[[], tuple[Tensor, Tensor | None]]
    """Gives states and mask, plain tensors. The ranks of ``meeting`` have to call it together."""
    meeting: list[dist.ProcessGroup]
    """Whose ranks exchange anything to read them."""
    splitting: list[dist.ProcessGroup]
    """Of these, whose ranks hold parts of the same sequences afterwards."""
    counts: bool
    """Whether the tokens count on this rank: not where a rank before it has the same."""


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, without the import of what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def share_of(states: DTensor, mask: Tensor | None, members: Collection[int] | None) -> Share:
    """What this rank reads of ``states`` ``(B, T, d)`` or ``(T, d)``.

    Args:
        states: Spread over a mesh in any way.
        mask: Of their shape without the features, whole on each rank, or a DTensor.
        members: The ranks whose tokens belong together; ``None``: all. What is spread over tokens, to ranks of which
            some are no members, is gathered by each of them.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, tokens = states.device_mesh, states.ndim - 2
    placements: list[Any] = []
    meeting, splitting, counts = [], [], True
    for dim, placement in enumerate(states.placements):
        group = mesh.get_group(dim)
        others = dist.get_process_group_ranks(group)
        if placement == Shard(0) and tokens > 0:
            placements.append(placement)
        elif placement.is_replicate():
            placements.append(placement)
            counts &= dist.get_rank() == min(rank for rank in others if members is None or rank in members)
        else:
            meeting.append(group)
            together = members is None or set(others) <= set(members)
            placements.append(Shard(tokens) if together else Replicate())
            splitting += [group] if together else []

    def local() -> tuple[Tensor, Tensor | None]:
        own = states.redistribute(mesh, placements).to_local()
        return own, None if mask is None else _placed(mask, states, placements)

    return Share(local, meeting, splitting, counts)


def on_whole(states: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply work that needs all tokens; of a DTensor, every rank of its mesh has all of the result."""
    if not is_sharded(states):
        return work(states)
    everywhere = _replicated(states)
    whole = states.redistribute(states.device_mesh, everywhere).to_local()
    return type(states).from_local(work(whole), states.device_mesh, everywhere, run_check=False)


def _placed(mask: Tensor, states: DTensor, placements: list[Any]) -> Tensor:
    # Nothing is sent where a rank takes its part of what it has as a whole.
    whole = (
        mask
        if is_sharded(mask)
        else type(states).from_local(mask.to(states.device), states.device_mesh, _replicated(states), run_check=False)
    )
    return whole.redistribute(states.device_mesh, placements).to_local()


def _replicated(states: DTensor) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * states.device_mesh.ndim
