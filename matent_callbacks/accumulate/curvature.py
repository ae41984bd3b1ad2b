"""The curvature of sequences, in a fixed amount of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from matent_callbacks.accumulate.pieces import rows_of_a_piece, slices
from matent_callbacks.accumulate.sequence_mean import SequenceMean
from matent_callbacks.functional._tokens import finite_rows
from matent_callbacks.functional.trajectory import counting_first, sum_of_angles


def mean_curvature(states: Tensor, mask: Tensor, *, dtype: torch.dtype) -> SequenceMean:
    """Mean over the sequences of ``(B, T, d)`` of the mean angle along each, a few sequences or tokens at a time."""
    length = states.shape[1]
    rows = rows_of_a_piece(states.shape[-1], dtype)
    finite = torch.empty_like(mask)
    total = torch.zeros(len(states), dtype=dtype, device=states.device)
    number = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    for some in slices(len(states), max(1, rows // max(1, length))):
        for part in slices(length, rows):
            finite[some, part] = finite_rows(states[some, part].to(dtype))
    order, count = counting_first(mask & finite)
    for some in slices(len(states), max(1, rows // max(1, length))):
        of_each = torch.arange(some.start, some.stop, device=states.device).unsqueeze(1)
        # Each angle takes three tokens, so parts share two with the next.
        for part in slices(max(length - 2, 0), max(1, rows - 2)):
            places = order[some, part.start : part.stop + 2]
            angles, turns = sum_of_angles(states[of_each, places].to(dtype), count[some] - part.start)
            total[some] += angles
            number[some] += turns
    defined = number > 0
    mean = torch.where(defined, total / number.clamp(min=1), 0.0).sum() / defined.sum().clamp(min=1)
    return SequenceMean(defined.sum(), (mask & ~finite).sum(), mean)
