"""Tells lists of transformer blocks from other lists of modules, and finds modules by where they stand in a model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_WRAPPER_PARTS = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}


def clean_name(name: str) -> str:
    """A module path without the parts that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def ancestries(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For every module in ``model``, the modules from there down to it, both included."""
    found: dict[nn.Module, tuple[nn.Module, ...]] = {model: (model,)}

    def descend(module: nn.Module) -> None:
        for child in module.children():
            if child not in found:
                found[child] = (*found[module], child)
                descend(child)

    descend(model)
    return found


def is_stack(blocks: nn.Module) -> bool:
    """Whether these are blocks: modules with children, all of one type except in an ``nn.ModuleList`` (hybrids)."""
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        return False
    children = blocks_of(blocks)
    if not children or any(not list(child.children()) for child in children):
        return False
    kinds = {type(child) for child in children}
    return len(kinds) == 1 or isinstance(blocks, nn.ModuleList)


def blocks_of(blocks: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks of a list, or of a list of lists, as those of Funnel and PVT; a block that is in it twice, twice."""
    found: list[nn.Module] = []
    for child in blocks._modules.values():
        if child is not None:
            found.extend(child if isinstance(child, nn.ModuleList) else [child])
    return tuple(found)


def kind_of(blocks: nn.Module) -> str:
    """The class of the first of these blocks, by name."""
    return type(blocks_of(blocks)[0]).__name__


def after(parent: nn.Module, child: nn.Module) -> list[nn.Module]:
    """The children of a module that were made after one of them."""
    siblings = list(parent.children())
    return siblings[next(i for i, sibling in enumerate(siblings) if sibling is child) + 1 :]


def norm_after(parent: nn.Module, child: nn.Module) -> nn.Module | None:
    """The norm that follows the blocks, in the order the modules were made."""
    return next(filter(is_norm, after(parent, child)), None)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def are_parallel_lists(parent: nn.Module, found: nn.Module) -> bool:
    """Whether the parts of each block are in lists of their own, so that no module is a block."""
    lists = [child for child in parent.children() if isinstance(child, nn.ModuleList) and child is not found]
    are_attention = all(
        isinstance(part, nn.MultiheadAttention) or re.search(r"(Attention|Attn)\d*$", type(part).__name__)
        for part in found.children()
    )
    return are_attention and any(len(other) == len(list(found.children())) for other in lists)


def apart(parent: Any) -> str:
    """Say that blocks whose parts are in parallel lists cannot be read."""
    lists = [name for name, child in parent.named_children() if isinstance(child, nn.ModuleList)]
    return (
        f"`layers` needs a stack of blocks, but {type(parent).__name__} keeps the parts of its blocks in separate "
        f"lists ({', '.join(lists)}), so no module gives the output of a block. Pass module names or globs as "
        f"`layers`, or another part to look in as `module`."
    )
