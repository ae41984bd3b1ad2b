"""Side-effect-free inference on a model that is being trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.compiled import call_eagerly
from matent_callbacks.capture.randomness import same_random_numbers
from matent_callbacks.capture.restoring import CONTAINERS, restoring
from matent_callbacks.capture.stack import is_hugging_face, unwrap

# What torch itself keeps in each module, such as hooks; but whether it is in training mode.
_OF_TORCH = vars(nn.Module()).keys() - {"training"}
# The models on which side-effect-free inference is running now, the innermost call last.
_inferences: list[object] = []


def inference_depth() -> int:
    """Return how many :func:`side_effect_free` contexts are open.

    A reader must ignore the forwards inside contexts that were opened after it.
    """
    return len(_inferences)


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Side-effect-free inference: evaluation mode, inside :func:`preserved`."""
    with preserved(model), _every_module_called():
        # Module by module: `model.eval()` may be overridden to do more.
        for module in model.modules():
            module.training = False
            if "support_avx512bf16_for_cpu" in vars(module):
                # On a CPU the 4-bit layers of bitsandbytes would repack their weights in evaluation, for good, and
                # training would go on with other rounding.
                vars(module)["support_avx512bf16_for_cpu"] = False
        _inferences.append(model)
        try:
            yield
        finally:
            _inferences.pop()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Disable gradients; afterwards restore modes, counters, buffers, lists and the like, and random states."""
    # `training` is one of these attributes; others are counters and the like that a forward may set.
    attributes = [(module, _plain_attributes(module)) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    held = [list(own.values()) for _, own in (*attributes, *buffers)]
    restore = restoring(held)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    with same_random_numbers(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).update(before)
            for module, before in buffers:
                module._buffers.update(before)
            restore()


def adapters_around(part: Any, model: nn.Module) -> Any:
    """Return the PEFT model in ``model`` whose base is ``part`` or holds it; None if there is none."""
    wrappers = (m for m in model.modules() if hasattr(m, "disable_adapter") and hasattr(m, "peft_config"))
    return next((m for m in wrappers if m is not part and any(inside is part for inside in m.modules())), None)


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Switch the adapters of a PEFT model off; afterwards they are as they were.

    Raises:
        ValueError: If they are merged into the weights, which would be computed anew.
    """
    if any(getattr(module, "merged", False) for module in peft_model.modules()):
        raise ValueError("the adapters are merged into the weights of the base model, so it is not what it was.")
    # PEFT lets all weights of the active adapters train when they are switched on again.
    trained = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        with peft_model.disable_adapter():
            yield
    finally:
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    if type(module).__name__ == "FullyShardedDataParallel":
        return {"training": module.training}  # sets itself up in its first forward, and must not do so again
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_TORCH
        and (type(value) in CONTAINERS or isinstance(value, bool | int | float | Tensor | None))
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


def run(runnable: Sequence[nn.Module], batch: Any) -> None:
    """Run one forward eagerly, on keyword arguments (a mapping) or positional ones (a tuple, list or tensor).

    It is run through the first module whose own ``forward`` takes the batch, or else through the last one. An error
    has a note that says through which.
    """
    args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    model = _chosen(runnable, args, kwargs)
    device = device_of(model)
    try:
        args, kwargs = to_device(args, device), to_device(kwargs, device)
        call_eagerly(model, args, {**kwargs, **cheap_arguments(model, kwargs)} if kwargs else kwargs)
    except Exception as error:
        own = next((module for module in runnable if _has_forward(module)), model)
        error.add_note(_call_in_words(model, own, args, kwargs))
        raise


def why_unfit(runnable: Sequence[nn.Module], batch: Any) -> str | None:
    """Describe what a batch is, if a model of transformers is known not to take it; None if it may."""
    if not isinstance(batch, Mapping):
        return None
    model = _chosen(runnable, (), batch)
    if not is_hugging_face(model):
        return None
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim < 2:
        return f"`input_ids` of shape {tuple(ids.shape)}, as in a row of a data set before it is collated"
    nested = [key for key, value in batch.items() if isinstance(value, Mapping)]
    if nested and inspect.signature(unwrap(model).forward).parameters.keys().isdisjoint(batch):
        return ", ".join(f"{key!r}: {type(value).__name__}" for key, value in batch.items())
    return None


def _chosen(runnable: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    return next((module for module in runnable if _takes(module, args, kwargs)), runnable[-1])


def _takes(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if not _has_forward(module):
        return False
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def _has_forward(module: nn.Module) -> bool:
    """Whether it has a ``forward`` of its own: those of the base classes take anything and raise an error."""
    forward = inspect.unwrap(module.forward)  # hooks may be in place
    return getattr(forward, "__qualname__", "") not in ("_forward_unimplemented", "LightningModule.forward")


def _call_in_words(model: nn.Module, own: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    given = ", ".join(kwargs) if kwargs else f"{len(args)} positional"
    how = f"It was run as {type(model).__name__}({given})"
    if own is not model:
        takes = ", ".join(inspect.signature(own.forward).parameters)
        how = f"{how}, since {type(own).__name__}.forward({takes}) does not take these"
    return f"({how}.)"


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors inside mappings, lists and tuples to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def cheap_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that save work: no key-value cache, and without labels the logits of one position only."""
    # A PEFT model passes on what it does not name.
    taken = inspect.signature(unwrap(model).forward).parameters
    wanted: dict[str, Any] = {}
    # So do models of transformers that accept arguments through `**kwargs`.
    passed_on = is_hugging_face(model) and _has_config(model)
    if "use_cache" in taken or (passed_on and any(p.kind is p.VAR_KEYWORD for p in taken.values())):
        wanted["use_cache"] = False
    if "logits_to_keep" in taken and "labels" not in batch:
        wanted["logits_to_keep"] = 1
    return {name: value for name, value in wanted.items() if name not in batch}


def _has_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache") or hasattr(
        getattr(getattr(model, "config", None), "text_config", None), "use_cache"
    )
