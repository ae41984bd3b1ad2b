"""Compares the tokens of a probe with those of a reference: the same tokens each time, which all ranks chose once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.probe_tokens import Places, ProbeTokens, ReferenceTokens, TokenPairs, on_host
from matent_callbacks.accumulate.reduction import AllOrNone, all_reduce_sum, extremes, is_distributed

# In the order in which the wider one is taken where ranks differ.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Comparison:
    """What is compared on one probe, and the reference, of which each rank holds some layers.

    First the tokens are chosen (:meth:`choose`), from a reading of which only the masks are kept; then the reference is
    read and kept (:meth:`keep`). Every rank has to call both. From then on a monitor that has been told of it
    (:meth:`.EntropyMonitor.compare`) computes ``metrics``.

    Args:
        metrics: Names of :data:`.COMPARISONS`.
        most: How many tokens are compared at most.
        group: The ranks whose tokens belong together; ``None``: all.
    """

    def __init__(self, metrics: Sequence[str], most: int, group: dist.ProcessGroup | None) -> None:
        self.metrics = tuple(metrics)
        self.batch = 0
        """The number of the batch that is read now."""
        self.order: list[int] = []
        """The fingerprints of the batches of all ranks, in the order in which their tokens are numbered."""
        self.layers: tuple[str, ...] = ()
        """Those that have a reference."""
        self.reference: dict[str, ReferenceTokens] = {}
        """By layer: of those that this rank owns."""
        self.split_over = 0
        """How many ranks hold other tokens of the same batches; 0: none do."""
        self._most = most
        self.group = group
        self.places: dict[str, Places] | None = None

    def tokens(self, layer: str) -> ProbeTokens | None:
        """Return what keeps the tokens of a layer during one reading; ``None`` if none of it are compared."""
        if self.places is not None and layer not in self.places:
            return None
        return ProbeTokens(lambda: self.batch, None if self.places is None else self.places[layer])

    def choose(
        self,
        counted: Mapping[str, ProbeTokens],
        fingerprints: Sequence[int],
        device: torch.device,
        order: Sequence[int] = (),
    ) -> None:
        """Choose the tokens: evenly spaced among all that the masks have, over the batches of all ranks.

        Args:
            counted: What was kept of the masks of each layer.
            fingerprints: Of the batches of this rank. A batch that several ranks hold counts once.
            device: For what ranks exchange.
            order: Fingerprints in the order to number them in; without it, as the ranks have them.
        """
        held = self._fingerprints_of_ranks(fingerprints, device)
        rank = dist.get_rank(self.group) if is_distributed(self.group) else 0
        self.split_over = len(held) if any(tokens.is_split for tokens in counted.values()) else 0
        self.order = list(order) or list(dict.fromkeys(number for own in held for number in own))
        slots = {number: slot for slot, number in enumerate(self.order)}
        elsewhere = {number for own in held[:rank] for number in own}
        masks: dict[str, dict[int, Tensor]] = {layer: {} for layer in counted}
        numbers = torch.zeros(len(counted), len(self.order), len(held), dtype=torch.int64)
        with AllOrNone(device, [self.group] if is_distributed(self.group) else []):
            for row, (layer, tokens) in enumerate(counted.items()):
                for batch, number in enumerate(fingerprints):
                    parts = [mask for own, mask in tokens.masks if own == batch]
                    is_first = fingerprints.index(number) == batch and (tokens.is_split or number not in elsewhere)
                    if parts and is_first and number in slots:
                        masks[layer][batch] = torch.cat(parts).cpu()
                        numbers[row, slots[number], rank] = masks[layer][batch].sum()
        widths = [tokens.width for tokens in counted.values()]
        dtypes = [_DTYPES.index(tokens.dtype) if tokens.width else 0 for tokens in counted.values()]
        if is_distributed(self.group):
            numbers = all_reduce_sum(numbers.to(device), self.group).cpu()
            found = extremes([*widths, *dtypes], device, [self.group])
            widths, dtypes = [most for _, most in found[: len(widths)]], [most for _, most in found[len(widths) :]]
        self.places = {}
        for row, layer in enumerate(counted):
            # Where the tokens of each batch and rank begin, in the order of all.
            ends = numbers[row].flatten().cumsum(0)
            total = int(ends[-1]) if len(ends) else 0
            if not total:
                continue
            number = min(total, self._most)
            chosen = torch.arange(number) * total // number
            places = Places({}, {}, number, widths[row], _DTYPES[dtypes[row]])
            for batch, mask in masks[layer].items():
                end = ends[slots[fingerprints[batch]] * len(held) + rank]
                start = end - mask.sum()
                first, last = torch.searchsorted(chosen, torch.stack([start, end])).tolist()
                places.rows[batch] = on_host(torch.arange(first, last), device)
                places.positions[batch] = on_host(mask.nonzero().flatten()[chosen[first:last] - start], device)
            self.places[layer] = places

    def keep(self, kept: Mapping[str, ProbeTokens], failed: Collection[str], device: torch.device) -> None:
        """Keep what was read as the reference, but for the layers that failed on any rank.

        Raises:
            ValueError: If the reference does not have the layers.
            RuntimeError: If another rank could not keep its layers.
        """
        layers = tuple(layer for layer in self.places or () if layer not in failed)
        missing = [layer for layer in layers if layer not in kept]
        if missing:
            raise ValueError(f"`reference` must be a model with the same layers: it has no {', '.join(missing)}.")
        reference: dict[str, ReferenceTokens | None] = {}
        groups = [self.group] if is_distributed(self.group) else []
        message = "another rank could not keep the reference."
        with AllOrNone(device, groups, message):
            room = self.room(device)
        with AllOrNone(device, groups, message) as attempt:
            for layer, found in self._gathered(layers, kept, device, room):
                reference[layer] = attempt(_kept, *found, device)
        self.reference = {layer: tokens for layer, tokens in reference.items() if tokens is not None}
        self.layers = layers

    def restore(self, reference: Mapping[str, ReferenceTokens], layers: Sequence[str], device: torch.device) -> None:
        """Take a reference that was kept before: the ``layers`` of all ranks, of which this one owns some."""
        self.layers = tuple(layers)
        self.reference = {layer: _kept(*tokens, device) for layer, tokens in reference.items()}

    def owns(self, layer: str) -> bool:
        """Whether this rank holds the reference of a layer."""
        return self._owner(layer) in (None, dist.get_rank(self.group) if is_distributed(self.group) else None)

    def fits(self, layer: str, tokens: ReferenceTokens) -> bool:
        """Whether these may be the tokens of a layer that were chosen."""
        places = (self.places or {})[layer]
        return tokens.states.shape == (places.number, places.width) and tokens.counts.shape == (places.number,)

    def room(self, device: torch.device) -> Tensor | None:
        """Return the memory in which the ranks add up one layer after the other; ``None`` without other ranks.

        It is allocated before they exchange anything: one that ran out of memory then would keep the others waiting.
        """
        if not is_distributed(self.group):
            return None
        sizes = (math.prod(own.table) * own.summed_in.itemsize for own in (self.places or {}).values())
        return torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)

    def pairs(
        self,
        kept: Mapping[str, ProbeTokens],
        failed: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
        room: Tensor | None,
    ) -> dict[str, TokenPairs]:
        """Return by layer what is to be compared on this rank. Every rank has to call it, with its :meth:`room`."""
        layers = [layer for layer in self.layers if layer not in failed]
        found = self._gathered(layers, kept, device, room)
        return {layer: TokenPairs(self.reference[layer], *now, dtype) for layer, now in found}

    def _gathered(
        self, layers: Sequence[str], kept: Mapping[str, ProbeTokens], device: torch.device, room: Tensor | None
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield the layers that this rank owns. An error is raised at the end, when nobody waits for this rank."""
        failure: Exception | None = None
        for layer in layers:
            try:
                gathered = kept[layer].of_all_ranks(device, room, owner=self._owner(layer) or 0, group=self.group)
            except Exception as error:
                failure = failure or error
                continue
            if gathered is not None:
                yield layer, gathered
        if failure is not None:
            raise failure

    def _owner(self, layer: str) -> int | None:
        """The rank that holds the reference of a layer; ``None`` where there are no others."""
        if not is_distributed(self.group):
            return None
        return list(self.places or ()).index(layer) % dist.get_world_size(self.group)

    def _fingerprints_of_ranks(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        if not is_distributed(self.group):
            return [list(own)]
        rows = torch.tensor(list(own), dtype=torch.int64, device=device).reshape(-1, 1)
        return [part.flatten().tolist() for part in all_gather_ragged(rows, self.group)]


def _kept(states: Tensor, counts: Tensor, device: torch.device) -> ReferenceTokens:
    return ReferenceTokens(on_host(states, device), on_host(counts, device))
