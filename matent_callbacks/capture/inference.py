"""Side-effect-free inference on a model that is being trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.compiled import call_eagerly
from matent_callbacks.capture.randomness import same_random_numbers

# The models on which side-effect-free inference is running now, the innermost call last.
_on_the_side: list[object] = []


def sides() -> int:
    """Return how many :func:`quiet` contexts are open.

    A reader must ignore the forwards inside contexts that were opened after it.
    """
    return len(_on_the_side)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Side-effect-free inference: evaluation mode, inside :func:`preserved`."""
    with preserved(model), _every_module_called():
        # Module by module: `model.eval()` may be overridden to do more.
        for module in model.modules():
            module.training = False
        _on_the_side.append(model)
        try:
            yield
        finally:
            _on_the_side.pop()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Disable gradients; afterwards restore modes, counters, buffers and random states."""
    # `training` is one of these attributes; others are counters and the like that a forward may set.
    attributes = [(module, _plain_attributes(module)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    with same_random_numbers(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).update(before)
            for module, name, buffer, values, version in buffers:
                # A forward may write into a buffer, or replace it. A buffer that it did not touch is not written to
                # here either: the backward pass of an earlier forward may need it, and would refuse it.
                module._buffers[name] = buffer
                if version is None or version != _version(buffer):
                    buffer.copy_(values)


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    if type(module).__name__ == "FullyShardedDataParallel":
        return {"training": module.training}  # sets itself up in its first forward, and must not do so again
    return {
        name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | Tensor | None)
    }


@contextmanager
def _every_module_called() -> Iterator[None]:
    """Disable torch's fast path, which in evaluation mode bypasses the modules inside its transformer layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(model: nn.Module, batch: Any) -> None:
    """Run one forward eagerly, on keyword arguments (a mapping) or positional ones (a tuple, list or tensor)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = to_device(batch, device)
    kwargs = {**batch, **cheap_arguments(model, batch)} if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    call_eagerly(model, args, kwargs)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors inside mappings, lists and tuples to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value


def cheap_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that save work: no key-value cache, and without labels the logits of one position only."""
    taken = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {}
    # Models that pass on arguments they do not name accept this through `**kwargs`.
    if "use_cache" in taken or (_has_config(model) and any(p.kind is p.VAR_KEYWORD for p in taken.values())):
        wanted["use_cache"] = False
    if "logits_to_keep" in taken and "labels" not in batch:
        wanted["logits_to_keep"] = 1
    return {name: value for name, value in wanted.items() if name not in batch}


def _has_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache") or hasattr(
        getattr(getattr(model, "config", None), "text_config", None), "use_cache"
    )
