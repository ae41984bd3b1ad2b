"""Finds what the connector of a vision-language model is given, which says more than any config what it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.alignment.joint_forward import describe, not_found

# Class and register tokens of an encoder that a connector may not be given.
_MOST_DROPPED = 16
_SELECTS = re.compile("(select|feature).*layer|layer.*(select|feature)")


class Call(NamedTuple):
    """A call of a part of the model."""

    part: str
    given: list[Tensor]
    """Its arguments that are hidden states."""
    masks: list[Tensor]
    output: Any


@contextmanager
def calls_of_parts(model: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of the parts of a model, such as its encoder and its connector, in their order."""
    calls: list[Call] = []

    def record(part: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        named = [("", value) for value in args] + list(kwargs.items())
        tensors = [(name, value) for name, value in named if isinstance(value, Tensor) and value.ndim > 1]
        given = [value for name, value in tensors if value.is_floating_point() and "mask" not in name]
        calls.append(Call(part, given, [value for _, value in tensors if not value.is_floating_point()], output))

    handles = []
    for name, child in model.named_children():
        for part in child if isinstance(child, nn.ModuleList) else (child,):
            hook = lambda _, args, kwargs, output, name=name: record(name, args, kwargs, output)  # noqa: E731
            handles.append(part.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def as_taken(
    model: Any, calls: Sequence[Call], features: Any, states: Tensor, num_units: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the states ``(rows, patches, d)`` as the connector takes them, and those of each unit if it takes these.

    They are ``states`` unless the connector was seen to be given others: a connector that is no part of the model, but
    of its encoder, is not seen.

    Raises:
        ValueError: If it is given something that is not understood.
    """
    inputs, masks = _inputs_of_connector(calls, features, states)
    if not inputs:
        if unknown := _unknown_selection(model.config):
            raise not_found(model, "vision_encoder", f"its config has `{unknown}`, and its connector is not seen")
        return states, []
    if any(mask.numel() == states.shape[:2].numel() and bool((mask != mask.flatten()[0]).any()) for mask in masks):
        raise not_found(model, "vision_encoder", "its connector is given a mask that hides some of the patches")
    width = states.shape[-1]
    if sum(map(Tensor.numel, inputs)) == states.numel():
        if len(inputs) == 1 and inputs[0].shape[-1] == width:
            return inputs[0].reshape(states.shape), []
        if _same_numbers(inputs, states):
            return states, []
    elif len(inputs) == 1 and _is_without_few(inputs[0], states):
        return inputs[0], []
    elif len(inputs) == num_units and all(own.shape[-1] == width for own in inputs):
        return states, [own.reshape(-1, width) for own in inputs]
    given = ", ".join(map(describe, inputs[:3])) + (", ..." if len(inputs) > 3 else "")
    raise not_found(
        model, "vision_encoder", f"its encoder gives {describe(states)} and its connector is given {given}, not these"
    )


def _inputs_of_connector(calls: Sequence[Call], features: Any, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the part is given in each of its calls that runs next after the encoder, and the masks beside it."""
    of_encoder = [getattr(features, "last_hidden_state", None), *(getattr(features, "hidden_states", None) or ())]
    places = {own.data_ptr() for own in of_encoder if isinstance(own, Tensor)}
    ends = [i for i, call in enumerate(calls) if any(own.data_ptr() in places for own in _tensors(call.output))]
    later = [call for call in calls[ends[0] + 1 :] if call.part != calls[ends[0]].part] if ends else []
    own = [call for call in later if call.part == later[0].part and call.given]
    # Queries and the like may be given as well.
    inputs = [next((x for x in call.given if x.numel() == states.numel()), call.given[0]) for call in own]
    return inputs, [mask for call in own for mask in call.masks]


def _unknown_selection(config: Any) -> str | None:
    """Return the name of a setting that selects layers, and is not the one that models of transformers share."""
    for own in (config, getattr(config, "vision_config", None)):
        settings: Mapping[str, Any] = {} if own is None else vars(own)
        for name, value in settings.items():
            if value is not None and name != "vision_feature_layer" and _SELECTS.search(name):
                return name
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _is_without_few(given: Tensor, states: Tensor) -> bool:
    """Whether it may be the same rows without their first tokens, of one layer or several side by side."""
    if given.ndim != 3 or given.shape[0] != states.shape[0] or given.shape[-1] % states.shape[-1]:
        return False
    return 0 <= states.shape[1] - given.shape[1] <= _MOST_DROPPED


def _same_numbers(inputs: Sequence[Tensor], states: Tensor) -> bool:
    """Whether they are the same numbers in another order, as where patches are put side by side."""
    given = torch.cat([own.flatten() for own in inputs])
    ordered = [own.nan_to_num().sort().values for own in (given, states.flatten().to(given.dtype))]
    return torch.equal(*ordered)
