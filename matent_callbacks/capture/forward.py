"""The state of one forward while it runs: whether it counts, which of its tokens do, and where documents begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.capture.labels import Labels, Unlabelled, up_to_last
from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.masks import Masks
from matent_callbacks.capture.own_forward import Tails, comes_from
from matent_callbacks.capture.packing import PACKED_BY, Packing, find_packing, may_number
from matent_callbacks.capture.purpose import functions_running


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
    passes: Counter[str] = field(default_factory=Counter)
    """How many passes each layer was read in."""
    unmasked: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The layers whose padding was counted because no mask fitted, with the lengths of mask and hidden states."""
    perhaps_masks: dict[str, str] = field(default_factory=dict)
    """The layers that no mask fitted, with the name of an argument that may be one."""
    unlabelled: dict[str, Unlabelled] = field(default_factory=dict)
    """The layers of which a forward was left out since labels do not tell which of its tokens count."""


class Reading(NamedTuple):
    """What is read of one call of a module."""

    hidden_states: Tensor | None
    mask: Tensor | None
    vectors: Tensor | None

    def kept(self) -> Reading:
        """A copy: what follows may write to the hidden states in place."""
        return Reading(*(None if tensor is None else tensor.clone() for tensor in self))


@dataclass
class Call:
    """One call of a module of the chain."""

    module: nn.Module
    functions: int
    """How many autograd functions run around it (see :func:`.functions_running`)."""
    counts: bool = False
    has_gradients: bool = False
    is_again: bool = False
    """Whether it is a second call in one pass over the same tokens."""
    called: set[nn.Module] = field(default_factory=set)
    """The modules of the chain that it has called."""


@dataclass
class Forward:
    """The state of one forward. Each thread has its own."""

    masks: Masks
    samples: Tensor | None
    """``(B,)``: which samples count."""
    labels: Labels | None = None
    """Tell which tokens count in the loss, or which tokens of a decoder are padding; None: it does not matter."""
    only_in_loss: bool = False
    """Whether only tokens that count in the loss are read."""
    graph_task: int = -1
    """The backward pass that it runs in, as where a loss embeds again to get its gradients; -1: in none."""
    packing: Packing | None = None
    calls: list[Call] = field(default_factory=list)
    """The calls of modules of the chain that are running, outermost first."""
    awaits_forward: bool = False
    """Whether the innermost of them was called by ``module(...)``, and its ``forward`` has not begun yet."""
    is_past_embeddings: bool = False
    """Whether the first block has been called; a block with shared weights is called again, not on embeddings."""
    given: dict[nn.Module, Tensor] = field(default_factory=dict)
    """The tokens that each transformer was called with last."""
    outputs: dict[nn.Module, Tensor | None] = field(default_factory=dict)
    """What each transformer of one's own gave in its last call: where it is called on that, the pass goes on."""
    tails: Tails = field(default_factory=dict)
    block_input: Tensor | None = None
    """What a block of one's own was called with, until its attention is called."""
    waiting: tuple[ReadPoint, nn.Module, tuple[Any, ...], dict[str, Any], Any] | None = None
    """The arguments of the reading of that, which has to wait until its layout is known."""
    rows: tuple[int, ...] = ()
    """The shape of the tokens, images or the like that the model was called with, ``(B, ...)``."""
    packed_by: tuple[Any, ...] = ()
    """The arguments by which it was last looked whether the batch is packed."""
    passes: Counter[str] = field(default_factory=Counter)
    """How often the transformers around a layer have been called on new tokens, by the key of the layer."""
    read: set[tuple[str, int]] = field(default_factory=set)
    """In which of these passes each layer was read."""
    held: dict[tuple[str, int], Reading] = field(default_factory=dict)
    """Layers that may be called again in the same pass. The last call counts."""
    without_gradients: dict[tuple[str, int], Reading] = field(default_factory=dict)
    """Layers called without gradients. They count if nothing in this forward has any."""

    @property
    def counts(self) -> bool:
        return bool(self.calls) and self.calls[-1].counts

    def has_gradients(self) -> bool:
        """Whether what is computed now is differentiated later, perhaps by computing it again."""
        call = self.calls[-1]
        return torch.is_grad_enabled() or (call.has_gradients and functions_running() > call.functions)

    def is_new_pass(self, module: nn.Module, arguments: Mapping[str, Any], around: Sequence[Call]) -> bool:
        """Note what a transformer is called with; whether this call is a pass of its own.

        It is not where its ``forward`` is called on the same tokens while it is being called: what hooks do that need
        its output beforehand.
        """
        tokens = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        is_same = tokens is not None and tokens is self.given.get(module)
        if tokens is not None:
            self.given[module] = tokens
        given = self.outputs.get(module)
        if given is not None and tokens is not None and tokens.is_floating_point() and comes_from(tokens, given):
            return False  # blocks that run in a loop
        is_again = any(call.module is module or call.is_again for call in around)
        return not (is_same and is_again)

    def collect(self, module: nn.Module, arguments: Mapping[str, Any], *, is_given: bool = False) -> None:
        """Collect masks and labels among the arguments that ``module`` is called with, see :meth:`.Masks.collect`."""
        if is_given and not self.rows:
            first = next((value for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1), None)
            # What has three dimensions may be embeddings, whose layout is what is asked.
            self.rows = tuple(first.shape) if first is not None and first.ndim != 3 else ()
        self.masks.collect(module, arguments, is_given=is_given)
        if self.labels is not None:
            self.labels.collect(module, arguments)

    def find_packing(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Look whether the batch is packed, unless a module around ``module`` was called with the same arguments."""
        by = tuple(arguments.get(name) for name in PACKED_BY)
        if len(by) == len(self.packed_by) and all(a is b for a, b in zip(by, self.packed_by, strict=True)):
            return
        self.packed_by = by
        self.packing = find_packing(arguments, numbered=may_number(module, arguments)) or self.packing

    def tokens(
        self, point: ReadPoint, hidden_states: Tensor, arguments: Callable[[], dict[str, Any]], seen: Seen
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states batch first, with one document per row, and which of them count.

        Args:
            point: Where they were read.
            hidden_states: What was read.
            arguments: Returns what the module was called with; only called if no mask seen so far fits.
            seen: Where it is recorded if no mask fits, or no labels.
        """
        if hidden_states.is_nested:
            padded, mask = _padded(hidden_states)
            mask = self._of_samples(mask)
            return (padded, mask) if not self.only_in_loss else self._in_loss(point, padded, mask, seen)
        if hidden_states.ndim == 2:  # all tokens in one long row, as experts see them
            hidden_states = hidden_states.reshape(*self._rows(point, len(hidden_states)), hidden_states.shape[-1])
        packing = self.packing
        if packing is not None and packing.fits(hidden_states.shape[:-1]):
            packing = packing.of_rows(len(hidden_states))
            valid, samples, outer = packing.valid, self.samples, self.masks.outer(packing.shape)
            if outer is not None:
                valid = packing.inside & outer.to(valid.device).flatten()[packing.tokens]
            if samples is not None and len(samples) == packing.shape[0]:
                valid = valid & samples.to(valid.device)[packing.tokens // packing.shape[1]]
            if self.only_in_loss:
                every = torch.ones(packing.shape, dtype=torch.bool, device=valid.device)
                valid = valid & self._in_loss(point, hidden_states, every, seen)[1].flatten()[packing.tokens]
            return packing.unpack(hidden_states), valid
        if hidden_states.ndim == 3 and self._is_sequence_first(point, tuple(hidden_states.shape[:2])):
            hidden_states = hidden_states.transpose(0, 1)
        hidden_states, fitting = self.masks.fitting(hidden_states, point.masked_by)
        if fitting is None:
            self.masks.collect(point.module, arguments())
            hidden_states, fitting = self.masks.fitting(hidden_states, point.masked_by)
        if point.is_decoder and not (self.only_in_loss or self.masks.has_given(point.masked_by)):
            found = Unlabelled("none") if self.labels is None else self.labels.fitting(point, hidden_states)
            if not isinstance(found, Unlabelled) and found[0].ndim == 3:
                return found[0], self._of_samples(up_to_last(found[1]))
        if fitting is not None:
            counted = self._of_samples(fitting)
            if hidden_states.ndim == 2:
                hidden_states = hidden_states.reshape(*counted.shape, -1)
            if self.only_in_loss:
                return self._in_loss(point, hidden_states, counted, seen)
            return hidden_states, counted
        self.masks.check_outer(hidden_states.shape[:-1])
        if self.only_in_loss:  # which padding has none of
            return self._in_loss(point, hidden_states, None, seen)
        length = self.masks.length_of_unfit(hidden_states, point.masked_by)
        if length is not None:
            seen.unmasked.setdefault(point.key, (length, hidden_states.shape[-2]))
        elif hidden_states.ndim == 3 and (name := self.masks.unknown(hidden_states, point.masked_by)):
            seen.perhaps_masks.setdefault(point.key, name)
        if self.samples is None or hidden_states.ndim not in (2, 3):
            return hidden_states, None
        return hidden_states, self._of_samples(torch.ones_like(hidden_states[..., 0], dtype=torch.bool))

    def _is_sequence_first(self, point: ReadPoint, shape: tuple[int, ...]) -> bool:
        """Whether hidden states are ``(T, B, d)``; in a model of one's own, the size of the batch comes first."""
        if not point.is_own or not self.rows or [size == self.rows[0] for size in shape].count(True) != 1:
            return point.sequence_first
        return shape[1] == self.rows[0] and (point.sequence_first or shape == self.rows[::-1])

    def _rows(self, point: ReadPoint, number: int) -> tuple[int, ...]:
        """The shape ``(B, T)`` of as many tokens, or ``(number,)`` where it is not known or T is 1."""
        if point.sequence_first:
            return (number,)
        given = (tokens.shape[:2] for module, tokens in self.given.items() if module in point.masked_by)
        fitting = (shape for shape in given if len(shape) == 2 and shape[1] > 1 and shape.numel() == number)
        return tuple(next(fitting, (number,)))

    def _in_loss(
        self, point: ReadPoint, hidden_states: Tensor, mask: Tensor | None, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states and those of their tokens that also count in the loss; none if labels do not tell."""
        assert self.labels is not None
        found = self.labels.fitting(point, hidden_states)
        if not isinstance(found, Unlabelled):
            states, in_loss = found
            if states.ndim == 2:
                states = states.reshape(*in_loss.shape, -1)
            if mask is None:
                return states, self._of_samples(in_loss)
            if mask.shape == in_loss.shape:
                return states, mask & in_loss.to(mask.device)
            found = Unlabelled("unfit", tuple(in_loss.shape), tuple(mask.shape))
        seen.unlabelled.setdefault(point.key, found)
        return hidden_states, torch.zeros(hidden_states.shape[:-1], dtype=torch.bool, device=hidden_states.device)

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
