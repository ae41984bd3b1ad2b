"""What is known of one forward while it runs: whether it counts, which of its tokens do, and where documents begin."""

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
    """What ran while a model was watched, to explain what was not read."""

    ran: set[nn.Module] = field(default_factory=set)
    """Of the modules in the chain and inside."""
    called: set[str] = field(default_factory=set)
    """Layers."""
    counted: bool = False
    """Whether any forward counted."""
    unmasked: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layers whose padding was counted, since no mask fitted: the lengths of mask and hidden states."""


@dataclass
class Forward:
    """What belongs to one forward. Each thread is in one of its own."""

    masks: Masks
    samples: Tensor | None
    """``(B,)``: those that count."""
    graph_task: int = -1
    """The backward pass that it is part of, such as that of a loss which embeds once more for its gradients; or -1."""
    counts: bool = False
    packing: Packing | None = None
    modules: list[nn.Module] = field(default_factory=list)
    """Of the chain, those that run, the outermost first."""
    is_met: bool = False
    """Whether the innermost of them was called by ``module(...)``, and its ``forward`` has not begun yet."""
    is_past_embeddings: bool = False
    """Whether the first block was called: where blocks share weights, it is called again, and not on embeddings."""

    def tokens(
        self, point: ReadPoint, hidden_states: Tensor, arguments: Callable[[], dict[str, Any]], seen: Seen
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states with their batch first, one row a document, and which of them count.

        Args:
            point: Where they were read.
            hidden_states: What was read.
            arguments: What the module was called with, asked for where no mask is known yet that fits.
            seen: Is told where none fits.
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
    """``(B, T, d)`` and ``(B, T)`` bool of sequences of unlike lengths in one tensor, as torch's fast path has them."""
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=nested.device)
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    return padded, torch.arange(padded.shape[1], device=nested.device) < lengths.unsqueeze(1)
