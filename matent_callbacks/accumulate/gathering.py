"""Gathers rows of all ranks on every rank, and finds items that several ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_ragged(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Gather the rows ``(n, d)`` of each rank on every rank. A rank without rows need not know d.

    Floating point rows are returned in float64 if any rank has float64 rows, else in float32.

    Raises:
        ValueError: On every rank, if those with rows differ in d.
    """
    sizes = torch.zeros(dist.get_world_size(group), 3, dtype=torch.int64, device=rows.device)
    sizes[dist.get_rank(group)] = torch.tensor([*rows.shape, rows.element_size()])
    dist.all_reduce(sizes, group=group)
    with_rows = [size for size in sizes.tolist() if size[0]]
    if not with_rows:
        return [rows] * len(sizes)
    longest, width, element_size = map(max, zip(*with_rows, strict=True))
    if any(size[1] != width for size in with_rows):
        raise ValueError("`probe` must give as many features on every rank as on the others.")
    dtype = rows.dtype
    if rows.is_floating_point():
        dtype = torch.float64 if element_size == 8 else torch.float32
    padded = torch.zeros(longest, width, dtype=dtype, device=rows.device)
    if len(rows):
        padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(len(sizes))]
    dist.all_gather(gathered, padded, group=group)
    return [part[:count] for part, count in zip(gathered, sizes[:, 0].tolist(), strict=True)]


def held_first(names: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Return for each item of this rank, given by its number, whether no lower rank holds it as well."""
    everybodys = all_gather_ragged(torch.tensor(list(names), dtype=torch.int64, device=device).reshape(-1, 1), group)
    before = {name for part in everybodys[: dist.get_rank(group)] for name in part.flatten().tolist()}
    return [name not in before for name in names]
