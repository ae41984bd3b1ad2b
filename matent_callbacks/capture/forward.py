"""The state of one forward while it runs: whether it counts, which of its tokens do, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.masks import Masks
from matent_callbacks.capture.packing import Packing


@dataclass
class Seen:
    """Records what ran while a model was watched, to explain why something was not read."""

    ran: set[nn.Module] = field(default_factory=set)
    """The modules of ``Layers.chain`` and ``Layers.inside`` that were called."""
    called: set[str] = field(default_factory=set)
    """The keys of the layers that were called."""
    counted: bool = False
    """Whether any forward counted."""
    broken_off: bool = False
    """Whether a forward raised an error, which says why nothing was read."""
    unmasked: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The layers whose padding was counted because no mask fitted, with the lengths of mask and hidden states."""


@dataclass
class Forward:
    """The state of one forward. Each thread has its own."""

    masks: Masks
    samples: Tensor | None
    """``(B,)``: which samples count."""
    graph_task: int = -1
    """The backward pass that it runs in, as where a loss embeds again to get its gradients; -1: in none."""
    counts: bool = False
    packing: Packing | None = None
    modules: list[nn.Module] = field(default_factory=list)
    """The modules of the chain that are running, outermost first."""
    is_met: bool = False
    """Whether the innermost of them was called by ``module(...)``, and its ``forward`` has not begun yet."""
    is_past_embeddings: bool = False
    """Whether the first block has been called; a block with shared weights is called again, not on embeddings."""

    def tokens(
        self, point: ReadPoint, hidden_states: Tensor, arguments: Callable[[], dict[str, Any]], seen: Seen
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states batch first, with one document per row, and which of them count.

        Args:
            point: Where they were read.
            hidden_states: What was read.
            arguments: Returns what the module was called with; only called if no mask seen so far fits.
            seen: Where it is recorded if no mask fits.
        """
        if hidden_states.is_nested:
            padded, mask = _padded(hidden_states)
            return padded, self._of_samples(mask)
        packing = self.packing
        if packing is not None and hidden_states.shape[:-1] == packing.shape:
            valid, samples = packing.valid, self.samples
            if samples is not None and len(samples) == packing.shape[0]:
                valid = valid & samples.to(valid.device)[packing.tokens // packing.shape[1]]
            return packing.unpack(hidden_states), valid
        if point.sequence_first and hidden_states.ndim == 3:
            hidden_states = hidden_states.transpose(0, 1)
        hidden_states, fitting = self.masks.fitting(hidden_states, point.masked_by)
        if fitting is None:
            self.masks.look(point.module, arguments())
            hidden_states, fitting = self.masks.fitting(hidden_states, point.masked_by)
        if fitting is not None:
            counted = self._of_samples(fitting)
            if hidden_states.ndim == 2:  # all tokens in one long row, as experts see them
                hidden_states = hidden_states.reshape(*counted.shape, -1)
            return hidden_states, counted
        length = self.masks.length_of_unfit(hidden_states, point.masked_by)
        if length is not None:
            seen.unmasked.setdefault(point.key, (length, hidden_states.shape[-2]))
        if self.samples is None or hidden_states.ndim not in (2, 3):
            return hidden_states, None
        return hidden_states, self._of_samples(torch.ones_like(hidden_states[..., 0], dtype=torch.bool))

    def _of_samples(self, mask: Tensor) -> Tensor:
        if self.samples is None or len(self.samples) != len(mask):
            return mask
        samples = self.samples.to(mask.device)
        return mask & (samples.unsqueeze(1) if mask.ndim == 2 else samples)


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """Pad a nested tensor, as torch's fast path produces it: ``(B, T, d)``, and its mask ``(B, T)`` bool."""
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=nested.device)
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    return padded, torch.arange(padded.shape[1], device=nested.device) < lengths.unsqueeze(1)
