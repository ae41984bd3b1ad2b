"""Compiled modules, in which hooks either do not fire or become part of the graph: they are read beside the graph.

A hook that is registered after the first compiled call is ignored (torch guards no hooks by default), and one that is
there at the first call is traced into the graph and stays. So the call is met at its entrance instead, and the module
is run there once more without its graph, from the same random state: the values of an uncompiled run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from matent_callbacks.capture.layers import Layers
from matent_callbacks.capture.stack import ancestries

Meeting = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def compiled_entrance(model: nn.Module, layers: Layers) -> nn.Module | None:
    """The module whose call leads into compiled code that holds a read point; None where none does."""
    if not any(map(_is_compiled, model.modules())):
        return None
    above = ancestries(model)
    for point in layers.points:
        entrance = next((m for m in above.get(point.module, ()) if _is_compiled(m)), None)
        if entrance is None:
            continue
        if layers.owner is None or entrance in above.get(layers.owner, ()):
            return entrance
        # Single blocks are compiled: their mask is known to the module around them.
        return layers.owner
    return None


def meet(module: nn.Module, before: Meeting) -> Callable[[], None]:
    """Call ``before(module, args, kwargs)`` ahead of each call of ``module``; returns what undoes it."""
    compiled_call = module._compiled_call_impl
    if compiled_call is None:
        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    # Compiled in place by `module.compile()`: its hooks are inside the graph, so the call itself is met.
    def met_call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        return compiled_call(*args, **kwargs)

    module._compiled_call_impl = met_call

    def undo() -> None:
        module._compiled_call_impl = compiled_call

    return undo


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, whatever is compiled in ``model`` runs without its graph, so that hooks fire."""
    # The stance imports the compiler, which takes seconds: not where there is nothing compiled.
    return torch.compiler.set_stance("force_eager") if any(map(_is_compiled, model.modules())) else nullcontext()


def call_eagerly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a module, and all compiled ones in it, without any graph."""
    with eagerly(module):
        getattr(module, "_orig_mod", module)._call_impl(*args, **kwargs)


def _is_compiled(module: nn.Module) -> bool:
    # Not by `hasattr`, which a module without it answers by an exception: a model has hundreds of modules.
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return True
    # `model.forward = torch.compile(model.forward)`, and perhaps what stands around it while calls are watched.
    own = vars(module).get("forward")
    return any(hasattr(forward, "_torchdynamo_orig_callable") for forward in (own, getattr(own, "__wrapped__", None)))
