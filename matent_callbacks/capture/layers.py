"""Resolves what the user asks for (``"last"``, 3, ``"every:4"``, ``"*.mlp"``) to the modules to read."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import nn

from matent_callbacks.capture.blocks import ancestries, clean_name
from matent_callbacks.capture.own_stack import may_be_sequence_first
from matent_callbacks.capture.stack import (
    Stack,
    find_stack,
    hugging_face_models,
    is_hugging_face,
    sequence_first,
    trained_object,
    unwrap,
)

LayerSpec = str | int | Sequence[str | int]


@dataclass(frozen=True)
class ReadPoint:
    """One tensor to read: the input or the output of a module."""

    key: str
    module: nn.Module
    where: Literal["input", "output"]
    masked_by: frozenset[nn.Module] = frozenset()
    """The modules around it, and inside, whose masks describe the tokens of this tensor."""
    labelled_by: frozenset[nn.Module] = frozenset()
    """The modules around it whose labels ``(B, T)`` describe its tokens; none for an encoder beside a decoder."""
    is_decoder: bool = False
    """Whether it is in a decoder beside an encoder, whose labels may be all that tells its padding."""
    sequence_first: bool = False
    """Whether the tensor is ``(T, B, d)``, as in torch's own layers without ``batch_first``."""
    is_own: bool = False
    """Whether it is in a model of one's own, where the size of the batch can tell that the layout is another."""
    role: Literal["plain", "block", "norm", "part"] = "plain"
    """A last block is read unless a norm follows it, a norm if it follows; a part of a block never is."""
    is_near: bool = True
    """Whether a norm may follow with something between the blocks and it (see :class:`.Norm`)."""
    others: tuple[ReadPoint, ...] = ()
    """Where else the same layer may have to be read, which is told when the model runs."""


@dataclass(frozen=True)
class Layers:
    """The modules of a model that have to be watched to read the layers that were asked for."""

    points: tuple[ReadPoint, ...]
    chain: tuple[nn.Module, ...]
    """Modules whose call is a forward of the model, outermost first; the first one to be called begins the forward."""
    inside: tuple[nn.Module, ...]
    """Modules called during a forward that may be given a different mask than the model itself."""
    around: tuple[nn.Module, ...]
    """Modules around all these, outermost first: only they may be given the labels."""
    unhooked: frozenset[nn.Module]
    """Those of all these that must have no hooks: a hook would make torch leave its fast path in evaluation."""
    owner: nn.Module | None
    """The transformer that the blocks belong to, if blocks were asked for."""
    stack: Stack | None
    """The main stack of blocks of the model, if there is an obvious one, whether or not it was asked for."""
    attention: tuple[nn.Module, nn.MultiheadAttention] | None
    """A block, and attention in it that takes the sequence first: its call shows whether the block does, too."""
    runnable: tuple[nn.Module, ...]
    """What a probe may be run through: from the model as it is trained down to the one Hugging Face model inside."""


def resolve_layers(
    model: nn.Module, layers: LayerSpec = "last", *, module: str | None = None, layer_offset: int | None = None
) -> Layers:
    """Find the modules to read.

    Args:
        model: The model as it is trained, wrapped or not.
        layers: ``"last"``, ``"all"``, ints, ``"every:n"``, module names or globs, or a list of these.
        module: Path of the part of the model to look in; ``None``: the language model, or the encoder of an
            encoder-decoder.
        layer_offset: For a pipeline stage, the number of blocks in the stages before it; ``None``: not a stage.

    Raises:
        ValueError: If nothing matches; the message lists near matches.
    """
    if layer_offset is not None and (type(layer_offset) is not int or layer_offset < 0):
        raise ValueError(f"`layer_offset` must be None or a whole number, 0 or more, got {layer_offset!r}.")
    inner = unwrap(model)
    root = inner if module is None else _submodule(inner, module)
    asked = [layers] if isinstance(layers, str | int) else list(layers)
    if not asked:
        raise ValueError("`layers` must name at least one layer, got an empty list.")
    named, above = _named_modules(root), ancestries(inner)
    stack: Stack | None = None
    points: dict[str, ReadPoint] = {}
    for spec in asked:
        if isinstance(spec, bool) or not isinstance(spec, str | int):
            raise TypeError(f"`layers` must hold names and ints, got {spec!r} ({type(spec).__name__}).")
        matched = _matches(spec, named, root) if isinstance(spec, str) else None
        if matched is None:
            stack = stack or find_stack(root, above.get(root, ())[:-1])
            indices = _readable(stack, spec, _indices(spec, len(stack.blocks), layer_offset or 0))
            found = [_stack_point(stack, index, layer_offset) for index in indices]
        elif matched:
            found = [ReadPoint(name, named[name], "output") for name in matched]
        else:
            raise ValueError(_unknown(spec, list(named)))
        points.update({point.key: point for point in found})
    owner = stack.owner if stack else None
    main = stack if module is None and stack else _stack_or_none(inner)
    # An encoder-decoder as a whole is called with the encoder's mask; to read one part takes the mask of that part.
    outside = [] if module and getattr(getattr(inner, "config", None), "is_encoder_decoder", False) else [model, inner]
    owners = [found.owner for found in (stack, main if outside else None) if found]
    known = stack or main
    runnable = _runnable(model, root, known.owner if known else None)
    # Prefix tuning makes a cache in the wrapper, wherever that is, and only the wrapper is given the user's mask.
    wrappers = [m for m in model.modules() if hasattr(m, "get_base_model") and hasattr(m, "peft_config")]
    chain = [*outside, *(wrappers if outside else ()), root, *hugging_face_models(root).values(), *owners]
    # For masks, the last hidden state of a transformers model counts as the output of its last block.
    ends = () if stack is None else (stack.last, *(norm.module for norm in stack.norms))
    places = {p.key: stack.blocks[-1] if stack and p.module in ends else p.module for p in points.values()}
    inside = [m for place in places.values() for m in _below(root, above[place]) if not _is_container(m)]
    watched = [*chain, *inside, *(each.module for point in points.values() for each in (point, *point.others))]

    def describe(point: ReadPoint) -> ReadPoint:
        path = above[point.module]
        masked_by = _masked_by(model, path, above[places[point.key]], main)
        labelled_by, is_decoder = _labelled_by(model, path, masked_by)
        is_own = not any(map(is_hugging_face, path))
        return replace(
            point,
            masked_by=masked_by,
            labelled_by=labelled_by,
            is_decoder=is_decoder,
            sequence_first=sequence_first(path) or (is_own and may_be_sequence_first(path)),
            is_own=is_own and not sequence_first(path),
            others=tuple(map(describe, point.others)),
        )

    described = tuple(map(describe, points.values()))
    return Layers(
        described,
        tuple(dict.fromkeys(chain)),
        tuple(m for m in dict.fromkeys(inside) if m not in chain),
        tuple(m for m in above.get(root, ()) if m not in chain),
        frozenset(m for m in watched if any(isinstance(a, nn.TransformerEncoderLayer) for a in above.get(m, ()))),
        owner,
        main,
        _attention_of(known.first) if known and any(p.is_own and p.sequence_first for p in described) else None,
        runnable=runnable,
    )


def _attention_of(block: nn.Module) -> tuple[nn.Module, nn.MultiheadAttention] | None:
    found = (m for m in block.modules() if isinstance(m, nn.MultiheadAttention))
    return next(((block, attention) for attention in found), None)


def _runnable(model: nn.Module, root: nn.Module, owner: nn.Module | None) -> tuple[nn.Module, ...]:
    """List what a probe may be run through, outermost first; the last is for a probe that fits none of them."""
    outer = trained_object(model)
    above = ancestries(outer)
    # With PEFT around them: prompts and prefixes are put in by its `forward`.
    inside = [outer.get_submodule(name) for name in hugging_face_models(outer)]
    if len(inside) > 1:
        inside = [found for found in inside if found in above.get(root, ()) or root in above[found]]
    to = inside[0] if len(inside) == 1 else owner
    path = dict.fromkeys(map(trained_object, (outer,) if to is None else above.get(to, (outer,))))
    return tuple(path) if len(inside) == 1 else (*path, outer)


def _stack_or_none(model: nn.Module) -> Stack | None:
    try:
        return find_stack(model)
    except ValueError:
        return None


def _below(root: nn.Module, path: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    return path[path.index(root) :] if root in path else path


def _is_container(module: nn.Module) -> bool:
    """Whether it is never called itself; only its children are."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _masked_by(
    model: nn.Module, path: tuple[nn.Module, ...], place: tuple[nn.Module, ...], main: Stack | None
) -> frozenset[nn.Module]:
    """Modules whose masks describe a read point; what a multi-tower model is given describes its main stack only."""
    nearest = max((index for index, module in enumerate(path) if is_hugging_face(module)), default=None)
    if nearest is None or (main is not None and main.owner in path[nearest:]):
        return frozenset((model, *path, *place))
    return frozenset((*path[nearest:], *place[nearest:]))


def _labelled_by(
    model: nn.Module, path: tuple[nn.Module, ...], masked_by: frozenset[nn.Module]
) -> tuple[frozenset[nn.Module], bool]:
    """Modules whose labels describe a read point, and whether it is in a decoder beside an encoder, whose they are."""
    for parent, child in pairwise(path):
        children = {module: name for name, module in parent.named_children()}
        kinds = {kind for name in children.values() for kind in ("encoder", "decoder") if name.endswith(kind)}
        if len(kinds) == 2 and children[child].endswith("encoder"):
            return frozenset(), False
        if len(kinds) == 2 and children[child].endswith("decoder"):
            return frozenset((model, *path)), True
    return masked_by, False


def _matches(spec: str, named: dict[str, nn.Module], root: nn.Module) -> list[str] | None:
    """The modules that a name or glob means; None: it means layers of the stack."""
    if not _is_stack_name(spec):
        return fnmatch.filter(named, spec)
    # An own module may be called `layer_0`, or `last` where there is no stack; in a model of transformers these are
    # always layers.
    is_key = spec in ("last", "all") or re.fullmatch(r"layer_\d{2,}", spec)
    is_own = spec in named and not hugging_face_models(root) and not (is_key and _stack_or_none(root))
    return [spec] if is_own else None


def _is_stack_name(spec: str) -> bool:
    return spec in ("last", "all") or spec.startswith("every:") or re.fullmatch(r"layer_\d+", spec) is not None


def _stack_point(stack: Stack, index: int, layer_offset: int | None) -> ReadPoint:
    """Where ``output_hidden_states[index]`` comes from; the key counts on from the blocks of earlier stages."""
    key = f"layer_{index + (layer_offset or 0):02d}"
    if index == len(stack.blocks):
        # A pipeline stage that ends with a block, not a norm, is followed by another stage.
        goes_on = layer_offset is not None and stack.last is stack.blocks[-1]
        return _last_point(stack, key if goes_on else "last")
    if index == 0:
        return ReadPoint(key, stack.first, "input")
    return ReadPoint(key, stack.blocks[index - 1], "output")


def _last_point(stack: Stack, key: str) -> ReadPoint:
    if not stack.norms:
        return ReadPoint(key, stack.last, "output")
    end = ReadPoint(key, stack.blocks[-1], "output", role="part" if stack.unreadable else "block")
    norms = [ReadPoint(key, norm.module, "output", role="norm", is_near=norm.is_near) for norm in stack.norms]
    likeliest = next(point for point in (end, *norms) if point.module is stack.last)
    return replace(likeliest, others=tuple(point for point in (end, *norms) if point is not likeliest))


def _readable(stack: Stack, spec: str | int, indices: list[int]) -> list[int]:
    """Leave out layers that no call shows: where a block is in the stack several times, its last call is read."""
    if stack.unreadable and indices != [len(stack.blocks)]:
        raise ValueError(stack.unreadable)
    again = [index for index in indices if 0 < index < len(stack.blocks) and _runs_again(stack, index)]
    if not again:
        return indices
    told = (
        f"the blocks that give {', '.join(f'layer_{index:02d}' for index in again)} run again further up, since they "
        "are in the stack several times, and only the last call of a block is read"
    )
    if again == indices:
        raise ValueError(f"`layers` asks for {spec!r}, but {told}.")
    warnings.warn(f"`layers` leaves out some of {spec!r}: {told}.", stacklevel=2)
    return [index for index in indices if index not in again]


def _runs_again(stack: Stack, index: int) -> bool:
    return stack.blocks[index - 1] in stack.blocks[index:]


def _indices(spec: str | int, num_blocks: int, offset: int) -> list[int]:
    if spec == "last":
        return [num_blocks]
    # The input of a later stage's first block is the output of the stage before, and is read there.
    inside = range(min(offset, 1), num_blocks + 1)
    if spec == "all":
        return list(inside)
    if isinstance(spec, str) and spec.startswith("every:"):
        stride = spec.removeprefix("every:")
        if not re.fullmatch(r"[1-9]\d*", stride):
            raise ValueError(f"`layers` must be like 'every:4', with a whole number above 0, got {spec!r}.")
        return [index for index in inside if (offset + index) % int(stride) == 0]
    number = spec if isinstance(spec, int) else int(spec.removeprefix("layer_"))
    index = number if number < 0 else number - offset
    if not -num_blocks - 1 <= index <= num_blocks or (number >= 0 and index < 0):
        raise ValueError(
            f"`layers` asks for {spec!r}, but the model has {num_blocks} blocks: {offset} "
            f"({'what goes into the first' if offset else 'embeddings'}) to {offset + num_blocks} ('last'), or -1 to "
            f"{-num_blocks - 1}."
        )
    return [index % (num_blocks + 1)]


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules() if name}


def _submodule(model: nn.Module, path: str) -> nn.Module:
    named = _named_modules(model)
    if path not in named:
        raise ValueError(_unknown(path, list(named), argument="module"))
    return named[path]


def _unknown(spec: str | int, names: list[str], *, argument: str = "layers") -> str:
    near = difflib.get_close_matches(str(spec), ["last", "all", *names], n=4, cutoff=0.4)
    hint = f"Near matches: {', '.join(near)}." if near else f"Its first modules: {', '.join(names[:4])}."
    return f"`{argument}` asks for {spec!r}, and no module of the model matches it. {hint}"
