"""The tokens of a layer on a probe that are compared with a reference: which they are, and their hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.reduction import global_rank
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional.drift import compare_tokens

TAKES = (4, "token valid in the reference and now")
"""How many of what the metrics take."""


class Places(NamedTuple):
    """Where in a probe the tokens of a layer are that are compared."""

    positions: dict[int, Tensor]
    """By the number of a batch on this rank: positions in its ``B * T`` tokens, ascending."""
    rows: dict[int, Tensor]
    """The same tokens' numbers among those of all ranks."""
    number: int
    """How many tokens all ranks have."""
    width: int
    dtype: torch.dtype
    """Of the hidden states."""

    @property
    def summed_in(self) -> torch.dtype:
        """The dtype in which the rows of ranks are added up: not every backend adds up others."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def table(self) -> tuple[int, int]:
        """Shape of the rows that are added up. The last column tells which of them count: one tensor is sent."""
        return self.number, self.width + 1


class ProbeTokens:
    """The tokens of one layer at certain places of a probe, while it is read; before these are known, all masks.

    Args:
        batch: Returns the number of the batch that is read now.
        places: Which tokens; ``None``: it keeps what :class:`Places` are chosen from.
    """

    def __init__(self, batch: Callable[[], int], places: Places | None) -> None:
        self._batch = batch
        self._places = places
        self.discard()

    def discard(self) -> None:
        """Forget what was added."""
        self._seen: dict[int, int] = {}
        self.masks: list[tuple[int, Tensor]] = []
        """Batch and ``(B * T,)`` bool: the tokens that the mask has, sinks included."""
        self.is_split = False
        """Whether other ranks hold other tokens of the same batches."""
        self.width = 0
        self.dtype = torch.float32
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, states: Tensor, unmasked: Tensor, counts: Tensor, *, is_split: bool = False) -> None:
        """Add one forward: ``(B, T, d)``, the mask ``(B, T)``, and the mask without sinks.

        Raises:
            ValueError: If d is not that of the reference.
        """
        batch = self._batch()
        first = self._seen.get(batch, 0)
        self._seen[batch] = first + unmasked.numel()
        self.width, self.dtype = states.shape[-1], states.dtype
        self.is_split |= is_split
        if self._places is None:
            self.masks.append((batch, unmasked.flatten()))
            return
        if self._places.width != self.width:
            raise ValueError(
                f"`reference` must be a model with the same layers: one has {self.width} features, the other "
                f"{self._places.width}."
            )
        positions, rows = (own.get(batch) for own in (self._places.positions, self._places.rows))
        if positions is None or rows is None:
            return
        start, end = torch.searchsorted(positions, torch.tensor([first, first + unmasked.numel()])).tolist()
        chosen = positions[start:end].to(states.device, non_blocking=True) - first
        tokens = states.detach().reshape(-1, self.width).index_select(0, chosen)
        own = rows[start:end].to(states.device, non_blocking=True)
        self._kept.append((own, tokens, counts.flatten().index_select(0, chosen)))

    def of_all_ranks(
        self,
        device: torch.device,
        room: Tensor | None = None,
        *,
        owner: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Return the states ``(n, d)`` and which of them count ``(n,)``, on their owner; ``None`` on other ranks.

        Each rank fills in the rows that it has, and their sum is sent to one rank: it takes no more than the tokens
        themselves, however many ranks there are. An error is raised afterwards, so that no rank waits in vain.

        Args:
            device: Of the states.
            room: Bytes for the rows of one layer, from :meth:`.Comparison.room`. ``None``: there are no other ranks.
            owner: The rank that they are sent to.
            group: The ranks that take part.
        """
        places = self._places
        assert places is not None
        if room is None:
            table = torch.zeros(places.table, dtype=places.dtype, device=device)
        else:
            size = math.prod(places.table) * places.summed_in.itemsize
            table = room[:size].view(places.summed_in).view(places.table).zero_()
        failure = None
        try:
            for rows, tokens, counts in self._kept:
                rows = rows.to(device)
                table[rows, :-1] = tokens.to(device, table.dtype)
                table[rows, -1] = counts.to(device, table.dtype)
        except Exception as error:
            failure = error
        self._kept = []  # in memory once
        if room is not None:
            dist.reduce(table, dst=global_rank(owner, group), group=group)
        if failure is not None:
            raise failure
        if room is not None and dist.get_rank(group) != owner:
            return None
        # The room is that of the next layer, too.
        return table[:, :-1].to(places.dtype, copy=room is not None), table[:, -1] > 0


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the host, from where a GPU can fetch it while the program goes on."""
    found = tensor.cpu().contiguous()
    return found.pin_memory() if device.type == "cuda" else found


class ReferenceTokens(NamedTuple):
    """The tokens of one layer in the reference, on the host."""

    states: Tensor
    """``(n, d)``, in the dtype of the hidden states."""
    counts: Tensor
    """``(n,)`` bool."""


class TokenPairs(NamedTuple):
    """The same tokens of one layer in the reference and now."""

    reference: ReferenceTokens
    states: Tensor
    counts: Tensor
    dtype: torch.dtype
    """Of the statistics. On the CPU it is always float64."""

    def to(self, device: torch.device) -> TokenPairs:
        """Return a copy with the states of now on a device."""
        return self._replace(states=self.states.to(device), counts=self.counts.to(device))

    def compare(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute what :func:`.compare_tokens` returns for these names."""
        device = self.states.device
        if device.type == "cpu":
            # Whose products in float64 do not depend on settings of the process, which a thread must leave alone.
            return self._compared(torch.float64, names)
        with full_precision(device):
            return self._compared(self.dtype, names)

    def _compared(self, dtype: torch.dtype, names: Iterable[str]) -> dict[str, Tensor]:
        device = self.states.device
        before = self.reference.states.to(device, non_blocking=True).to(dtype)
        counts = self.reference.counts.to(device, non_blocking=True) & self.counts
        return compare_tokens(before, self.states.to(dtype), counts, names)
