"""What is done when modules are called: whether a forward counts, and which call of a layer in it is read."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.forward import Call, Forward, Reading, Seen
from matent_callbacks.capture.inference import inference_depth
from matent_callbacks.capture.labels import Labels
from matent_callbacks.capture.layers import Layers, ReadPoint
from matent_callbacks.capture.masks import Masks
from matent_callbacks.capture.own_forward import OwnForwards
from matent_callbacks.capture.passes import Guard, Passes, Reader
from matent_callbacks.capture.purpose import (
    AdapterState,
    backward_pass,
    functions_running,
    has_filled_cache,
    in_backward,
    is_generating,
)
from matent_callbacks.capture.stack import is_hugging_face
from matent_callbacks.capture.values import first_tensor, input_states, named_arguments, sentence_embedding


@dataclass
class Wanted:
    """Which forwards count, and which of their tokens."""

    training_only: bool = False
    """Only those with gradients."""
    adapters: AdapterState | None = None
    """Only those with these adapters active; None: with any."""
    mask: Tensor | None = None
    """Overrides the masks that the model is given."""
    batch_mask: Tensor | None = None
    """Used where the model is given none."""
    samples: Tensor | None = None
    """``(B,)``: which samples count."""
    labels: Tensor | None = None
    """Used where no module is given labels that fit."""
    inference_depth: int = 0
    """How many readers run inference around: the forwards of further ones do not count."""


class Events:
    """Follows the forwards of a model, and calls the reader; see :class:`.Capture`, which registers the methods."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        reader: Reader,
        guard: Guard,
        *,
        discard: Callable[[str], None] | None = None,
        whole_sequences: bool = True,
        only_in_loss: bool = False,
    ) -> None:
        """``discard(key)`` makes the reader forget what it was called with for a layer.

        ``only_in_loss``: of the tokens of the masks, those whose label says that they count in the loss.
        """
        self.wanted = Wanted()
        self.runs_eagerly = False
        """Whether a compiled module is being re-executed, to be read."""
        self.model = model
        self.layers = layers
        self.guard = guard
        self._whole_sequences = whole_sequences
        self.reads_labels = only_in_loss or any(point.is_decoder for point in layers.points)
        self._only_in_loss = only_in_loss
        self._read_modules = frozenset(point.module for point in layers.points)
        # The layers inside each transformer: its call on other tokens is a new pass over them.
        own = {layers.owner, layers.stack.owner if layers.stack else None}
        self._inside_of = {
            module: [
                point.key
                for point in layers.points
                if any(each.module in set(module.modules()) for each in (point, *point.others))
            ]
            for module in (*layers.chain, *layers.inside)
            if is_hugging_face(module) or module in own
        }
        self._own = OwnForwards()
        self._passes = Passes(layers, reader, guard, discard)
        self._has_counted = False
        self._forwards: dict[int, Forward] = {}
        # By thread: those of modules around the chain, while such a module runs.
        self._labels: dict[int, Labels] = {}
        self._masks_alone: dict[int, Masks] = {}

    @property
    def seen(self) -> Seen:
        """What ran since :meth:`forget_seen`."""
        return self._passes.seen

    def forget_seen(self) -> None:
        """Begin a new record of what ran."""
        self._passes.seen = Seen()

    @property
    def attention(self) -> tuple[nn.Module, nn.MultiheadAttention] | None:
        """A block, and attention in it, to learn the layout of the blocks from; None: there is nothing to learn."""
        return self.layers.attention if self._own.layout is None else None

    def forget_forwards(self) -> None:
        """Drop every reference to forwards that have not come to their end."""
        self._forwards.clear()
        self._masks_alone.clear()

    def end(self) -> None:
        """Drop every reference to what was read, and to what was wanted."""
        self.wanted = Wanted()
        self._has_counted = False
        self.forget_forwards()
        self._labels.clear()

    # Hooks before and after a module in the chain that is called by `module(...)`. Under nn.DataParallel they also fire
    # on its replicas, so `module` may be a replica of `watched`.

    def enter(self, watched: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        forward = self._forwards.setdefault(threading.get_ident(), self._new_forward())
        around = forward.calls[-1] if forward.calls else None
        call = Call(watched, functions_running())
        call.has_gradients = torch.is_grad_enabled() if around is None else forward.has_gradients()
        forward.calls.append(call)
        forward.awaits_forward = True
        with self.guard("all"):
            self.seen.ran.add(watched)
            arguments = named_arguments(module, args, kwargs)
            if around is None:
                forward.graph_task = backward_pass()
                is_wanted = (self.runs_eagerly or self.is_wanted()) and not (in_backward() and self._has_counted)
            else:
                is_wanted = around.counts
            # A cache that the caller of the model fills; or the model's own forward, which decodes in a loop.
            is_decoding = has_filled_cache(arguments) and (around is None or watched in around.called)
            call.counts = is_wanted and not is_decoding and not is_generating(self._read_modules)
            if around is not None:
                around.called.add(watched)
            call.is_again = not self._begins_pass(forward, watched, arguments, forward.calls[:-1])
            forward.collect(watched, arguments, is_given=True)
            if call.counts:
                forward.find_packing(watched, arguments)
                if forward.packing is not None and not self._whole_sequences:
                    raise ValueError(
                        "a batch is packed, so `context_group` does not tell whose tokens are one document."
                    )

    def _begins_pass(
        self, forward: Forward, module: nn.Module, arguments: dict[str, Any], around: Sequence[Call]
    ) -> bool:
        """Whether a transformer begins a pass over its tokens. Then what is held of the pass before is read."""
        if module not in self._inside_of:
            return True
        if not forward.is_new_pass(module, arguments, around):
            return False
        forward.is_past_embeddings &= module is not self.layers.owner
        forward.outputs.pop(module, None)
        if is_hugging_face(module):  # which is told itself that a batch is packed
            forward.packing, forward.packed_by = None, ()
        self._passes.begin(forward, self._inside_of[module])
        return True

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Called after an error as well, without an output.
        self._leave(output, has_failed=output is None and sys.exc_info()[0] is not None)

    def _leave(self, output: Any, *, has_failed: bool) -> None:
        forward = None if torch.compiler.is_compiling() else self._forward
        if forward is None:
            return
        call = forward.calls.pop()
        if forward.calls and call.module in self._inside_of and not is_hugging_face(call.module):
            forward.outputs[call.module] = first_tensor(output)
        if not forward.calls:
            del self._forwards[threading.get_ident()]
            self._passes.end(forward, has_failed=has_failed)

    # Wrappers around `forward`, which also see `module.forward(...)`.

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self._forward
        if current is not None and current.awaits_forward and current.calls[-1].module is module:
            current.awaits_forward = False
            return forward(*args, **kwargs)
        try:
            self.enter(module, module, args, kwargs)
            self._forwards[threading.get_ident()].awaits_forward = False
            points = [point for point in self.layers.points if point.module is module]
            for point in points:
                forward = functools.partial(self.call_point, point, module, forward)
            output = forward(*args, **kwargs)
        except BaseException:
            self._leave(None, has_failed=True)
            raise
        self._leave(output, has_failed=False)
        return output

    def call_around(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        is_outermost = thread not in self._labels
        try:
            with self.guard("all"):
                labels = self._labels.setdefault(thread, Labels(self.model, self.wanted.labels))
                labels.collect(module, named_arguments(module, args, kwargs))
            return forward(*args, **kwargs)
        finally:
            if is_outermost:
                self._labels.pop(thread, None)

    def call_inside(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.collect_inside(module, module, args, kwargs)
        return forward(*args, **kwargs)

    def call_point(
        self, point: ReadPoint, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if point.where == "input":
            self.read_input(point, module, args, kwargs)
            return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        self.read(point, module, args, kwargs, output)
        return output

    def collect_inside(
        self, watched: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling():
            return
        with self.guard("all"):
            self.seen.ran.add(watched)
            arguments = named_arguments(module, args, kwargs)
            if self._forward is None:
                self._alone.collect(watched, arguments)
            else:
                self._begins_pass(self._forward, watched, arguments, self._forward.calls)
                self._forward.collect(watched, arguments)

    def enter_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a block of one's own is called with, to compare it with what its attention gets."""
        forward = None if torch.compiler.is_compiling() else self._forward
        if forward is not None and forward.counts and self._own.layout is None:
            forward.block_input = first_tensor(input_states(module, args, kwargs)[0])

    def see_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn from attention, which takes the sequence first, whether the block around it does."""
        forward = None if torch.compiler.is_compiling() else self._forward
        if forward is None or forward.block_input is None:
            return
        query = first_tensor(args or kwargs.get("query"))
        self._own.compare(forward.block_input, query)
        forward.block_input = None
        waiting, forward.waiting = forward.waiting, None
        if waiting is not None:
            self.read(*waiting)

    def read_input(self, point: ReadPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._forward
        if forward is None or not forward.is_past_embeddings:
            value = self._own.input_states(point, module, args, kwargs)
            if forward is not None and forward.block_input is not None and point.sequence_first and point.is_own:
                forward.waiting = point, module, args, kwargs, value
            else:
                self.read(point, module, args, kwargs, value)
        if forward is not None:
            forward.is_past_embeddings = True

    def read(
        self, point: ReadPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return
        forward = self._forward
        has_gradients = torch.is_grad_enabled() if forward is None else forward.has_gradients()
        with self.guard(point.key), torch.no_grad():
            self.seen.called.add(point.key)
            if not self._is_read(module):
                return
            self.seen.counted = True
            self._has_counted |= not in_backward()
            point = self._own.in_layout(point)
            if point.role != "plain":
                settled = self._passes.settled(self._own, forward, point, (*args, *kwargs.values()), value)
                if settled is None:
                    return
                point = settled
            hidden_states = first_tensor(value)
            mask = None
            if hidden_states is not None:
                arguments = functools.partial(named_arguments, module, args, kwargs)
                hidden_states, mask = (forward or self._alone).tokens(point, hidden_states, arguments, self.seen)
            reading = Reading(hidden_states, mask, sentence_embedding(value))
            if forward is None:
                self._passes.record(point.key, reading)
            else:
                is_alone = self.wanted.training_only and not has_gradients and not self.runs_eagerly
                self._passes.read(forward, point.key, reading, is_alone=is_alone)

    def _is_read(self, module: nn.Module) -> bool:
        forward = self._forward
        if forward is not None:
            return forward.counts and not in_backward(since=forward.graph_task)
        if in_backward() or self._is_of_another() or is_generating(self._read_modules):
            return False
        # Called alone, where recomputation that runs without gradients at first cannot be told from inference.
        is_training = module.training or torch.is_grad_enabled()
        return self.runs_eagerly or not self.wanted.training_only or is_training

    def _is_of_another(self) -> bool:
        """Whether this forward is the inference of another reader, such as a second callback's probe."""
        return inference_depth() > self.wanted.inference_depth

    def is_wanted(self) -> bool:
        """Whether a forward that begins now is read, as far as its surroundings tell."""
        if self._is_of_another():
            return False
        adapters, in_training = self.wanted.adapters, self.wanted.training_only
        if adapters is not None and not adapters.unchanged(in_training=in_training):
            return False
        return not self.wanted.training_only or torch.is_grad_enabled()

    def _new_forward(self) -> Forward:
        labels = None
        if self.reads_labels:
            labels = self._labels.get(threading.get_ident()) or Labels(self.model, self.wanted.labels)
        return Forward(
            Masks(self.model, self.wanted.mask, self.wanted.batch_mask),
            self.wanted.samples,
            labels,
            only_in_loss=self._only_in_loss,
        )

    @property
    def _alone(self) -> Forward:
        """For what runs outside of the chain: a forward of its own, with the masks that others outside were given."""
        forward, own = self._new_forward(), self._masks_alone
        forward.masks = own.setdefault(threading.get_ident(), forward.masks)
        return forward

    @property
    def _forward(self) -> Forward | None:
        return self._forwards.get(threading.get_ident())
