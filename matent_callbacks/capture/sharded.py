"""Decides which part of hidden states that are DTensors, sharded over a mesh of ranks, this rank reads, and with whom.

Tokens stay on their rank where possible. States sharded over the batch are read as they are, as in data parallelism;
so are states sharded over tokens, together with the ranks that hold the other tokens of each sequence. States sharded
over features, and partial sums, are redistributed so that each rank holds some complete tokens; a rank sends and
receives no more than one shard of the activations. Replicated states are read by one rank.
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
    """The part of hidden states that one rank reads."""

    local: Callable[[], tuple[Tensor, Tensor | None]]
    """Returns states and mask as plain tensors. The ranks of ``communicating`` have to call it together."""
    communicating: list[dist.ProcessGroup]
    """The groups whose ranks have to communicate for it."""
    sharing: list[dist.ProcessGroup]
    """Those of them whose ranks hold parts of the same sequences afterwards."""
    counts: bool
    """Whether the tokens count on this rank: not where a lower rank has the same."""


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, without importing ``torch.distributed.tensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def share_of(states: DTensor, mask: Tensor | None, members: Collection[int] | None) -> Share:
    """Find the part of ``states`` ``(B, T, d)`` or ``(T, d)`` that this rank reads.

    Args:
        states: Placed on a mesh in any way.
        mask: Shaped as ``states`` without the features; complete on each rank, or a DTensor.
        members: The ranks whose tokens belong together; ``None``: all. States sharded over tokens, on ranks of which
            some are not members, are gathered by each of them.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, tokens = states.device_mesh, states.ndim - 2
    placements: list[Any] = []
    communicating, sharing, counts = [], [], True
    for dim, placement in enumerate(states.placements):
        group = mesh.get_group(dim)
        others = dist.get_process_group_ranks(group)
        is_first = dist.get_rank() == min(rank for rank in others if members is None or rank in members)
        if placement == Shard(0) and tokens > 0:
            placements.append(placement)
        elif placement.is_replicate():
            placements.append(placement)
            counts &= is_first
        else:
            communicating.append(group)
            together = members is None or set(others) <= set(members)
            placements.append(Shard(tokens) if together else Replicate())
            sharing += [group] if together else []
            counts &= together or is_first

    def local() -> tuple[Tensor, Tensor | None]:
        own = states.redistribute(mesh, placements).to_local()
        return own, None if mask is None else _placed(mask, states, placements)

    return Share(local, communicating, sharing, counts)


def on_whole(states: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``work``, which needs all tokens; for a DTensor, every rank of its mesh gets the complete result."""
    if not is_sharded(states):
        return work(states)
    everywhere = _replicated(states)
    whole = states.redistribute(states.device_mesh, everywhere).to_local()
    return type(states).from_local(work(whole), states.device_mesh, everywhere, run_check=False)


def _placed(mask: Tensor, states: DTensor, placements: list[Any]) -> Tensor:
    # Sharding a tensor that is replicated sends nothing.
    whole = (
        mask
        if is_sharded(mask)
        else type(states).from_local(mask.to(states.device), states.device_mesh, _replicated(states), run_check=False)
    )
    return whole.redistribute(states.device_mesh, placements).to_local()


def _replicated(states: DTensor) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * states.device_mesh.ndim
