"""Unpacks packed batches, in which one row holds several documents, to one document per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matent_callbacks.capture.sharded import on_whole


class Packing(NamedTuple):
    """Where the documents of a packed batch lie in its flattened tokens."""

    shape: torch.Size
    """``(B, T)`` of the batch."""
    tokens: Tensor
    """``(S, L)``: which flattened token is at each position of each document."""
    valid: Tensor
    """``(S, L)`` bool."""

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(S, L, d)``."""
        return on_whole(hidden_states, lambda whole: whole.flatten(0, 1)[self.tokens])


def find_packing(arguments: dict[str, Any], mask: Tensor | None) -> Packing | None:
    """Find where documents begin from position ids that restart; None for a batch with one document per row.

    There is no other sign of packing that all models share: no mask comes with it, or one that marks padding only.
    Reading the positions costs one device-to-host sync, but few batches have any.
    """
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    if mask is not None and mask.shape != positions.shape:
        return None
    valid = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.to(positions.device) > 0
    first = torch.zeros_like(valid)
    first[:, 0] = True
    # Positions that fall back to their start; left padding stays at 0 or 1, and starts no document.
    again = torch.zeros_like(valid)
    falls = (positions[:, 1:] == 0) | (positions[:, 1:] < positions[:, :-1])
    again[:, 1:] = falls & valid[:, 1:] & valid[:, :-1]
    starting = (first | again).flatten()
    token = torch.arange(starting.numel(), device=starting.device)
    length_so_far = token + 1 - torch.where(starting, token, 0).cummax(0).values
    # The only device-to-host sync, however the batch is packed.
    is_packed, count, longest = torch.stack([again.any(), starting.sum(), length_so_far.max()]).tolist()
    if not is_packed:
        return None
    starts = torch.where(starting, token, starting.numel()).sort().values[:count]
    ends = F.pad(starts[1:], (0, 1), value=starting.numel())
    index = starts.unsqueeze(1) + torch.arange(longest, device=starts.device)
    inside = index < ends.unsqueeze(1)
    index = torch.where(inside, index, 0)
    return Packing(positions.shape, index, inside & valid.flatten()[index])
