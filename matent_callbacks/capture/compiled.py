"""Eager re-execution of compiled modules, in which hooks either do not fire or become part of the graph.

A hook registered after the first compiled call is ignored (by default torch does not guard on hooks), and one that is
there at the first call is traced into the graph and stays. So the call is intercepted where it enters compiled code,
and the module runs there a second time, eagerly and from the same random state: the values are those without compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from matent_callbacks.capture.blocks import ancestries
from matent_callbacks.capture.layers import Layers, ReadPoint
from matent_callbacks.capture.values import all_modules

BeforeCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def compiled_entrance(model: nn.Module, layers: Layers) -> nn.Module | None:
    """The module whose call leads into compiled code that holds a read point; None where none does."""
    if not any(map(_is_compiled, all_modules(model))):
        return None
    above = ancestries(model)
    for point in layers.points:
        # A norm outside of the compiled blocks is taken for the final one, without running these once more.
        places = (point,) if point.role == "norm" else (point, *point.others)
        within = (above.get(place.module, ()) for place in places)
        entrance = next((m for path in within for m in path if _is_compiled(m)), None)
        if entrance is None:
            continue
        if layers.owner is None or entrance in above.get(layers.owner, ()):
            return entrance
        # Only single blocks are compiled: the module around them is the one that is given the mask.
        return layers.owner
    return None


def follows_compiled(model: nn.Module, point: ReadPoint) -> bool:
    """Whether a final norm stands outside of compiled blocks, whose calls do not show that it follows them."""
    if point.role != "norm" or not any(map(_is_compiled, all_modules(model))):
        return False
    above = ancestries(model)
    block = next(other for other in point.others if other.role != "norm")
    return any(_is_compiled(m) for m in above.get(block.module, ()) if m not in above.get(point.module, ()))


def before_calls(module: nn.Module, before: BeforeCall) -> Callable[[], None]:
    """Call ``before(module, args, kwargs)`` before each call of ``module``; returns a function that undoes it."""
    compiled_call = module._compiled_call_impl
    if compiled_call is None:
        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    # Compiled in place by `module.compile()`: its hooks are inside the graph, so the call itself is wrapped.
    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        return compiled_call(*args, **kwargs)

    module._compiled_call_impl = call

    def undo() -> None:
        module._compiled_call_impl = compiled_call

    return undo


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, whatever is compiled in ``model`` runs eagerly, so that hooks fire."""
    # Setting the stance imports the compiler, which takes seconds: only where something is compiled.
    return torch.compiler.set_stance("force_eager") if any(map(_is_compiled, all_modules(model))) else nullcontext()


def call_eagerly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a module eagerly, and all compiled modules in it."""
    with eagerly(module):
        getattr(module, "_orig_mod", module)._call_impl(*args, **kwargs)


def _is_compiled(module: nn.Module) -> bool:
    # Not `hasattr`: it costs a raised exception in each module without the attribute, and a model has hundreds.
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return True
    # `model.forward = torch.compile(model.forward)`, perhaps wrapped by `around_calls`.
    own = vars(module).get("forward")
    if own is None:
        return False
    return any(hasattr(forward, "_torchdynamo_orig_callable") for forward in (own, getattr(own, "__wrapped__", None)))
