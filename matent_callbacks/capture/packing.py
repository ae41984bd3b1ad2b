"""Unpacks packed batches, in which one row holds several documents, to one document per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matent_callbacks.capture.masks import allowed
from matent_callbacks.capture.sharded import on_whole

# Where documents end in the flattened batch, as kernels for variable lengths take it; the first number is 0.
_ENDS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")

PACKED_BY = ("position_ids", "attention_mask", "seq_idx", *_ENDS)
"""The arguments that tell where documents begin."""


class Packing(NamedTuple):
    """Where the documents of a packed batch lie in its flattened tokens."""

    shape: torch.Size
    """``(B, T)`` of the batch; B = 1 may stand for several rows that are packed alike."""
    tokens: Tensor
    """``(S, L)``: which flattened token is at each position of each document."""
    inside: Tensor
    """``(S, L)`` bool: where a document has a token, valid or not."""
    valid: Tensor
    """``(S, L)`` bool."""

    def fits(self, rows: torch.Size) -> bool:
        """Whether hidden states with ``rows`` ``(B, T)`` are of this batch."""
        return len(rows) == 2 and rows[1] == self.shape[1] and self.shape[0] in (1, rows[0])

    def of_rows(self, count: int) -> Packing:
        """Return the same for a batch of ``count`` rows."""
        if count == self.shape[0]:
            return self
        begins = self.shape[1] * torch.arange(count, device=self.tokens.device).view(-1, 1, 1)
        return Packing(
            torch.Size((count, self.shape[1])),
            (self.tokens + begins).flatten(0, 1),
            self.inside.repeat(count, 1),
            self.valid.repeat(count, 1),
        )

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, d)`` to ``(S, L, d)``."""
        return on_whole(hidden_states, lambda whole: whole.flatten(0, 1)[self.tokens.to(whole.device)])


def may_number(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the numbers of a mask may be those of documents, as far as it is known without a wait.

    Kernels for variable lengths make use of such numbers, if they are taught to. For others a mask says yes or no.
    """
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.device.type == "cpu" and mask.ndim == 2:
        return mask.numel() > 0 and mask.amax().item() > 1
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return isinstance(mask, Tensor) and "flash" in str(implementation)


def find_packing(arguments: Mapping[str, Any], *, numbered: bool = False) -> Packing | None:
    """Find where documents begin; None for a batch with one document per row.

    A document begins where position ids fall back, of M-RoPE on all axes at once; where ``cu_seq_lens_q`` or
    ``seq_idx`` says so; or, by a mask of query-key pairs, where a token and the one before it do not see each other.
    Reading any of them costs one device-to-host sync, but few batches have one.

    Args:
        arguments: What a model is called with.
        numbered: Whether the numbers in a mask ``(B, T)`` may be those of documents, 1, 2, 3, .... Nearly every batch
            has a mask, and looking costs a device-to-host sync.
    """
    positions = _positions(arguments.get("position_ids"))
    mask = arguments.get("attention_mask")
    flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    sees = _pairs(mask)
    numbers = [_numbers_of_lengths(arguments), arguments.get("seq_idx")]
    numbers += [flat] if numbered and flat is not None and flat.dtype != torch.bool else []
    marks = [own for own in numbers if isinstance(own, Tensor) and own.ndim == 2]
    of_tokens = [*([] if positions is None else [positions[0]]), *marks, *([] if sees is None else [sees[:, 0]])]
    if not of_tokens:
        return None
    every = [own.shape for own in [*of_tokens, *([] if flat is None else [flat])]]
    shape = torch.Size((max(own[0] for own in every), every[0][1]))
    if any(own[0] not in (1, shape[0]) or own[1] != shape[1] for own in every):
        return None  # of other tokens, as where the mask covers a cache
    device = of_tokens[0].device
    if flat is not None:
        valid = allowed(flat, "attention_mask", is_given=True).to(device).expand(shape)
    else:
        valid = torch.ones(shape, dtype=torch.bool, device=device) if sees is None else _diagonal(sees).expand(shape)
    again = torch.zeros_like(valid)
    # The valid token before each, if there is one: padding starts no document, wherever it lies.
    place = torch.where(valid, torch.arange(shape[1], device=device), -1).cummax(1).values
    before = F.pad(place[:, :-1], (1, 0), value=-1)
    follows, before = valid & (before >= 0), before.clamp(min=0)
    if positions is not None:
        positions = positions.expand(-1, *shape)
        falls = positions < positions.gather(2, before.expand_as(positions))
        begins = falls.all(0) | (positions == 0).all(0)
        # All zero, for a model without positions, they tell nothing.
        again |= follows & begins & (positions != positions[..., :1]).any()
    for own in marks:
        number = own.to(device).expand(shape)
        again |= follows & (number != number.gather(1, before))
    if sees is not None:
        again |= follows & _apart(sees.to(device).expand(shape[0], -1, -1), before, valid, follows)
    return _packing(again, valid)


def _packing(again: Tensor, valid: Tensor) -> Packing | None:
    """The documents, given which tokens begin one in the middle of a row."""
    starting = again.clone()
    starting[:, 0] = True
    starting = starting.flatten()
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
    return Packing(valid.shape, index, inside, inside & valid.flatten()[index])


def _positions(positions: Any) -> Tensor | None:
    """``(axes, B, T)``: those of M-RoPE are three, which in an image fall one by one; of four the first is of text."""
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3) or positions.numel() == 0:
        return None
    if positions.ndim == 2:
        return positions.unsqueeze(0)
    return positions[:1] if len(positions) == 4 else positions


def _pairs(mask: Any) -> Tensor | None:
    """``(B, T, T)`` bool: which key each query sees, of a mask for pairs."""
    if not isinstance(mask, Tensor) or mask.ndim not in (3, 4) or mask.shape[-1] != mask.shape[-2]:
        return None
    return allowed(mask, "attention_mask", is_given=True) if mask.shape[-1] > 1 else None


def _diagonal(sees: Tensor) -> Tensor:
    return torch.diagonal(sees, dim1=1, dim2=2)


def _apart(sees: Tensor, before: Tensor, valid: Tensor, follows: Tensor) -> Tensor:
    """Which tokens ``(B, T)`` do not see the one before, nor it them; none if documents so found see each other."""
    back = sees.gather(2, before.unsqueeze(2)).squeeze(2)
    ahead = sees.transpose(1, 2).gather(2, before.unsqueeze(2)).squeeze(2)
    begins = follows & ~back & ~ahead
    number = begins.cumsum(1)
    across = sees & valid.unsqueeze(1) & valid.unsqueeze(2) & (number.unsqueeze(1) != number.unsqueeze(2))
    return begins & ~across.any()


def _numbers_of_lengths(arguments: Mapping[str, Any]) -> Tensor | None:
    """``(B, T)``: the number of each token's document, from where documents end in the flattened batch."""
    ends = next((arguments[name] for name in _ENDS if isinstance(arguments.get(name), Tensor)), None)
    if ends is None or ends.ndim != 1:
        return None
    rows = _rows(arguments)
    if rows is None:
        return None
    token = torch.arange(rows.numel(), device=ends.device)
    return torch.bucketize(token, ends[1:].to(token.dtype), right=True).view(rows)


def _rows(arguments: Mapping[str, Any]) -> torch.Size | None:
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return ids.shape
    states = (a for a in arguments.values() if isinstance(a, Tensor) and a.ndim == 3 and a.is_floating_point())
    return next((own.shape[:2] for own in states), None)
