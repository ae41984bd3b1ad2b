"""Finds the stack of blocks in a model that is not one of transformers, and the norms that may follow it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from matent_callbacks.capture.blocks import ancestries, blocks_of, clean_name, is_norm, is_stack

Path = tuple[nn.Module, ...]
"""The modules from a model down to one of its modules."""

# What mixes tokens, by the name of a class or an attribute.
_MIXES = re.compile(
    r"attn|attention|^(self_?|cross_?)?att$|mixer|mamba|ssm|rwkv|hyena|retention|qkv|^(to_|w_?)?[qkv](_?proj|_?lin)?$"
    r"|^query|^in_proj",
    re.IGNORECASE,
)
_ENCODER = re.compile(r"(^|_)enc(oder)?s?(_|$)", re.IGNORECASE)
_DECODER = re.compile(r"(^|_)dec(oder)?s?(_|$)", re.IGNORECASE)
_LANGUAGE_MODEL = re.compile(r"^(language_model|text_model|llm|lm)$")
_CALLED_NORM = re.compile(r"(^|_)(layer_?|rms_?|batch_?)?(norm|ln)\d*(_|$)", re.IGNORECASE)
_FINAL = re.compile(r"final|post|last|out|(^|_)(norm|ln)_f$|encoder_norm|decoder_norm", re.IGNORECASE)
_NOT_FINAL = re.compile(
    r"emb|input|(^|_)(in|pre|patch|stem|tok|token|pos|q|k|v|query|key|cond|context|mem|memory|head|cls|mlm|lm|pool\w*"
    r"|proj\w*|classifier|transform)(_|$)|norm_pre|ln_pre",
    re.IGNORECASE,
)


class Norm(NamedTuple):
    """A norm beside the blocks, or beside a module around them, that may be the final one."""

    module: nn.Module
    name: str
    is_near: bool
    """Whether it is inside the part that is looked at, beside no other stack, and not called as another norm is."""


def find_paths(model: nn.Module) -> list[Path]:
    """Find the stacks of blocks: the modules from ``model`` down to each.

    Lists inside blocks, as those of experts, are none; nor are those in which nothing mixes tokens, such as heads,
    beside others.
    """
    root_is_stack = _is_own_stack(model) and (_mixes(model) if isinstance(model, nn.Sequential) else True)
    if root_is_stack and len(blocks_of_own(model)) > 1:
        return [(model,)]
    found = [path for path in ancestries(model).values() if len(path) > 1 and _is_own_stack(path[-1])]
    passed = {path[-1] for path in found if _is_around_one_stack(path[-1])}
    stacks = {path[-1] for path in found} - passed
    outermost = [path for path in found if path[-1] in stacks and stacks.isdisjoint(path[1:-1])]
    return [path for path in outermost if _mixes(path[-1])] or outermost


def meant(model: nn.Module, paths: list[Path]) -> list[Path]:
    """Of an encoder and a decoder the encoder, of several towers a language model; all where names tell nothing."""
    if len(paths) < 2:
        return paths
    names = dict(zip(paths, branches(model, paths), strict=True))
    for is_meant in (
        [path for path in paths if _LANGUAGE_MODEL.search(_last(names[path]))],
        [path for path in paths if not _DECODER.search(_last(names[path]))],
    ):
        others = [path for path in paths if path not in is_meant]
        is_encoder = len(is_meant) == 1 and (
            _ENCODER.search(_last(names[is_meant[0]])) or all(path[-2] is is_meant[0][-2] for path in others)
        )
        if len(is_meant) == 1 and (is_encoder or _LANGUAGE_MODEL.search(_last(names[is_meant[0]]))):
            return is_meant
    return paths


def branches(model: nn.Module, paths: Sequence[Path]) -> list[str]:
    """Name, for each of several paths, the outermost module on it that is on no other."""
    names = {module: clean_name(name) for name, module in model.named_modules()}
    found = []
    for path in paths:
        elsewhere = {module for other in paths if other is not path for module in other}
        found.append(names[next((module for module in path if module not in elsewhere), path[-1])])
    return found


def blocks_of_own(blocks: nn.Module) -> Path:
    """The blocks of a list, a numbered dict or a list of lists; where their parts are apart, the last part of each."""
    if has_blocks_in_parts(blocks):
        return tuple(list(child.children())[-1] for child in blocks.children())
    return blocks_of(blocks)


def has_blocks_in_parts(blocks: nn.Module) -> bool:
    """Whether the parts of each block are in a list or dict of its own, so that no module is a block."""
    children = list(blocks.children())
    is_list = isinstance(blocks, nn.ModuleList) or (isinstance(blocks, nn.ModuleDict) and _is_numbered(blocks))
    are_lists = all(isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) for child in children)
    if not (is_list and children and are_lists):
        return False
    mixing = {_mixes(part) for child in children for part in child.children()}
    return len(mixing) == 2 or not all(isinstance(child, nn.ModuleList) and is_stack(child) for child in children)


def in_parts(blocks: nn.Module, name: str) -> str:
    """Say that blocks whose parts are in lists of their own cannot be read."""
    parts = [type(part).__name__ for part in next(blocks.children()).children()]
    return (
        f"`layers` needs a stack of blocks, but each item of {name!r} is a list of the parts of a block "
        f"({', '.join(parts)}), so no module gives the output of a block. Pass names or globs of modules as `layers`, "
        f"such as '{name}.*.0', or \"last\" where a norm follows the blocks, or make each block a module."
    )


def norms_beside(path: Path, around: Path, others: Iterable[Path]) -> list[Norm]:
    """The norms beside the blocks, and beside each module around these up to the model, the nearest first.

    Args:
        path: That of the blocks.
        around: The modules around the part of the model that is looked at, outermost first.
        others: The paths of other stacks: a norm beside both may be theirs.
    """
    shared = {module for other in others for module in other}
    own = set(path) - shared
    found: dict[nn.Module, Norm] = {}
    for parent in reversed((*around, *path[:-1])):
        for name, child in parent.named_children():
            is_one = is_norm(child) or (_CALLED_NORM.search(name) and not list(child.children()))
            if is_one and child not in path and not isinstance(child, nn.Identity):
                found.setdefault(child, Norm(child, name, parent in own and not _NOT_FINAL.search(name)))
    return list(found.values())


def likeliest(norms: Iterable[Norm], path: Path) -> nn.Module | None:
    """The norm that is the final one by its name, or by its place behind the blocks; None where none seems to be."""
    near = [norm for norm in norms if norm.is_near]
    behind: set[nn.Module] = set()
    for parent, child in pairwise(path):
        children = list(parent.children())
        behind.update(children[children.index(child) + 1 :])
    for is_it in (
        lambda norm: _FINAL.search(norm.name) and norm.module in behind,
        lambda norm: _FINAL.search(norm.name),
        lambda norm: norm.module in behind,
    ):
        found = next(filter(is_it, near), None)
        if found:
            return found.module
    return None


def may_be_sequence_first(path: Path) -> bool:
    """Whether a module is a block, or in one, whose attention is one of torch that takes ``(T, B, d)``."""
    for parent, module in pairwise(path):
        if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            attention = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
            if attention:
                return not any(m.batch_first for m in attention)
    return False


def _is_own_stack(blocks: nn.Module) -> bool:
    if has_blocks_in_parts(blocks):
        return _mixes(blocks)
    if isinstance(blocks, nn.ModuleDict):
        children = list(blocks.values())
        of_one_kind = len({type(child) for child in children}) == 1
        if not children or any(not list(child.children()) for child in children):
            return False
        return (_is_numbered(blocks) or (of_one_kind and _mixes(blocks))) and not _are_towers(blocks)
    return is_stack(blocks) and not _are_towers(blocks)


def _is_numbered(blocks: nn.ModuleDict) -> bool:
    return all(re.search(r"\d$", name) for name in blocks)


def _are_towers(blocks: nn.Module) -> bool:
    """Whether each of several is a transformer of its own, with embeddings and blocks."""
    return all(
        any(isinstance(m, nn.Embedding) for m in child.modules()) and _has_stack_inside(child)
        for child in blocks.children()
    )


def _is_around_one_stack(blocks: nn.Module) -> bool:
    """Whether it is a list of one module, which has the blocks."""
    children = list(blocks.children())
    return len(children) == 1 and not has_blocks_in_parts(blocks) and _has_stack_inside(children[0])


def _has_stack_inside(module: nn.Module) -> bool:
    inner = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential | nn.ModuleDict)]
    found = (list(m.children()) for m in inner if is_stack(m))
    return any(
        len(blocks) > 1 and all(_mixes(block) and not _is_attention(block) for block in blocks) for blocks in found
    )


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is attention alone, or one head of it."""
    name = type(module).__name__
    return bool((_MIXES.search(name) or name.endswith("Head")) and not re.search("(Block|Layer)s?$", name))


def _mixes(module: nn.Module) -> bool:
    """Whether a module holds attention, or what takes its place."""
    return any(
        isinstance(m, nn.RNNBase) or _MIXES.search(type(m).__name__) or _MIXES.search(_last(name))
        for name, m in module.named_modules()
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
