"""Finds the stack of transformer blocks inside a model, and the modules whose outputs are its hidden states."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import nn

from matent_callbacks.capture import own_stack
from matent_callbacks.capture.blocks import (
    after,
    ancestries,
    apart,
    are_parallel_lists,
    blocks_of,
    clean_name,
    is_norm,
    is_stack,
    kind_of,
    norm_after,
)
from matent_callbacks.capture.own_stack import Norm

TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_LANGUAGE_MODELS = ("language_model", "text_model", "thinker")
_HEAD = re.compile("For[A-Z]|LMHead|WithProjection|Backbone$")
_STATES = {"last_hidden_state", "language_output"}
_PERCEPTRON = re.compile("(FeedForward|MLP|Mlp)$")
_FSMT_LAYERS = ("EncoderLayer", "DecoderLayer")
_XLM = ("attentions", "layer_norm1", "ffns", "layer_norm2")


@dataclass(frozen=True)
class Stack:
    """The blocks of one transformer, in order, and the module whose output is the last hidden state."""

    blocks: tuple[nn.Module, ...]
    last: nn.Module
    owner: nn.Module
    """The transformer itself: the module that is given the attention mask."""
    first: nn.Module
    """The module whose input are the embeddings: the first block, where blocks are modules."""
    norms: tuple[Norm, ...] = ()
    """Norms that may follow the blocks. Which of them does, if any, is told when the model runs."""
    unreadable: str = ""
    """Why only ``last`` can be read, where no module gives the output of a block."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under DDP, FSDP, Fabric, ``torch.compile`` and PEFT wrappers."""
    inner: Any = trained_object(model)
    while hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = trained_object(inner.get_base_model())
    return inner  # type: ignore[no-any-return]


def trained_object(model: nn.Module) -> nn.Module:
    """What the user trains: the module under DDP, FSDP, Fabric and ``torch.compile``, with PEFT still around it."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        elif type(inner).__name__ == "_FabricModule":
            inner = inner._forward_module
        else:
            return inner  # type: ignore[no-any-return]


def sequence_first(path: tuple[nn.Module, ...]) -> bool:
    """Whether the module at the end of a path takes and gives ``(T, B, d)``.

    Modules of torch's own layers may; of transformers, what is inside XLNet, and the blocks of FSMT and BridgeTower.
    """
    for module in reversed(path):
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            module = module.layers[0]
        attention = getattr(module, "self_attn", None) if isinstance(module, TORCH_LAYERS) else module
        if isinstance(attention, nn.MultiheadAttention):
            return not attention.batch_first
    # FSDP2 makes a class of its own of a module's.
    above = {kind.__name__ for module in path[:-1] for kind in type(module).__mro__}
    kinds = [kind for module in path for kind in type(module).__mro__]
    return (
        "XLNetModel" in above
        or any(kind.__name__ == "BridgeTowerResidualAttention" for kind in kinds)
        or any(kind.__module__.endswith("fsmt") and kind.__name__ in _FSMT_LAYERS for kind in kinds)
    )


def find_stack(model: nn.Module, around: tuple[nn.Module, ...] = ()) -> Stack:
    """Find the one obvious stack of blocks in ``model``; ``around`` are the modules around it, outermost first.

    Raises:
        ValueError: If there is none, or several.
    """
    candidates = hugging_face_models(model)
    if len(candidates) > 1:
        raise ValueError(_several(model, candidates))
    hugging_face = next(iter(candidates.values()), None)
    paths = own_stack.find_paths(model) if hugging_face is None else _paths_in_hugging_face(hugging_face)
    if not paths:
        raise ValueError(
            f"`layers` needs a stack of blocks (an nn.ModuleList, nn.ModuleDict or nn.Sequential), and none was found "
            f"in {type(model).__name__}. Pass module names or globs as `layers`, or the part to look in as `module`"
            f"{_could_be(model)}."
        )
    if hugging_face is None:
        of_one = own_stack.meant(model, paths)
        if len(of_one) > 1:
            raise ValueError(_several(model, own_stack.branches(model, of_one)))
        return _own_stack(model, of_one[0], around, [path for path in paths if path is not of_one[0]])
    nearest = dict.fromkeys(_nearest(path) for path in paths)
    if len(nearest) > 1:
        names = {unwrap(module): clean_name(name) for name, module in model.named_modules()}
        raise ValueError(_several(model, [names[module] for module in nearest if module is not None]))
    *_, parent, found = path = paths[0]
    first, *_ = blocks = blocks_of(found)
    if are_parallel_lists(parent, found):
        blocks = _ends_of_post_norm(parent, next(iter(nearest)))
    last, owner = _last_state(path)
    is_known = any(kind.__module__.startswith("transformers.models.") for kind in type(owner).__mro__)
    if is_known or not (last is blocks[-1] or is_norm(last)):
        return Stack(blocks, last, owner, first)
    # A class of one's own, made as those of transformers are.
    norms = tuple(own_stack.norms_beside(path, (), []))
    return Stack(blocks, own_stack.likeliest(norms, path) or blocks[-1], owner, first, norms)


def _own_stack(
    model: nn.Module,
    path: tuple[nn.Module, ...],
    around: tuple[nn.Module, ...],
    others: Sequence[tuple[nn.Module, ...]],
) -> Stack:
    """The stack at the end of a path, in a model that is none of transformers and has ``others`` beside it."""
    found = path[-1]
    blocks = own_stack.blocks_of_own(found)
    # Lists and dicts are never called themselves.
    called = [module for module in path[:-1] if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    owner = called[-1] if called else model
    if len(path) > 1 and are_parallel_lists(path[-2], found):
        raise ValueError(apart(path[-2]))
    if isinstance(owner, nn.TransformerEncoder | nn.TransformerDecoder) and owner.norm is not None:
        return Stack(blocks, owner.norm, owner, blocks[0])
    norms = tuple(own_stack.norms_beside(path, around, others))
    final = own_stack.likeliest(norms, path)
    if not own_stack.has_blocks_in_parts(found):
        return Stack(blocks, final or blocks[-1], owner, blocks[0], norms)
    name = clean_name(next(name for name, module in model.named_modules() if module is found))
    message = own_stack.in_parts(found, name)
    near = [norm for norm in norms if norm.is_near]
    if not near:
        raise ValueError(message)
    return Stack(blocks, final or near[0].module, owner, next(next(found.children()).children()), norms, message)


def hugging_face_models(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself if it is one of transformers, or the outermost ones inside it, as in a LightningModule."""
    names = {module: name for name, module in model.named_modules()}
    level = [model]
    while level:
        found = {names[module]: unwrap(module) for module in level if is_hugging_face(module)}
        if found:
            return found
        level = [child for parent in level for child in parent.children()]
    return {}


def is_hugging_face(model: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    # Recognised by the attributes used here, so that transformers need not be imported.
    return all(hasattr(model, name) for name in ("config", "base_model", "get_input_embeddings", "get_decoder"))


def _paths_in_hugging_face(model: Any) -> list[tuple[nn.Module, ...]]:
    """The modules from a model of transformers down to its main stack: of its encoder, or of its language model."""
    within = ancestries(model)
    for part in _parts(model):
        paths = _paths_to_blocks(part) if part in within else []
        if paths:
            return [(*within[part][:-1], *path) for path in paths]
    return []


def _parts(model: Any) -> Iterator[Any]:
    """Where to look for the main stack, the best place first; the model itself is the last one."""
    named = [getattr(model, name, None) for name in _LANGUAGE_MODELS]
    # Before 5.0, some models with a head have no `get_encoder` of their own.
    encoded = next((found for found in (model, model.base_model) if hasattr(found, "get_encoder")), None)
    if getattr(model.config, "is_encoder_decoder", False) and encoded is not None:
        named.insert(0, encoded.get_encoder())
    # What is called `decoder` may be a head, which is no model of its own.
    named.append(model.get_decoder())
    for part in named:
        if isinstance(part, nn.Module) and part is not model and is_hugging_face(part):
            yield from _parts(part)
    if model.base_model is not model:
        yield from _parts(model.base_model)
    yield model


def _paths_to_blocks(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Find the list of blocks, or several that are as good: the modules from ``model`` down to it.

    In a model of transformers it is one as long as the config says; then the outermost one, as experts and heads lie
    deeper; then the longest.
    """
    paths = [path for path in ancestries(model).values() if len(path) > 1 and _is_list_of_blocks(path)]
    if is_hugging_face(model):
        # Blocks without a linear layer are those of a convolutional network, whose values are not tokens.
        paths = [path for path in paths if _has_linear(path[-1]) and not _PERCEPTRON.search(kind_of(path[-1]))]

    def preference(path: tuple[nn.Module, ...]) -> tuple[bool, bool, int, bool, int]:
        length, config = len(blocks_of(path[-1])), getattr(_nearest(path), "config", None)
        is_depth = length == getattr(config, "num_hidden_layers", None)
        return is_depth, length in _depths(config), -len(path), _has_linear(path[-1]), length

    best = max(map(preference, paths), default=None)
    # Without a number to go by, one of several kinds could be part of a head.
    kinds = {kind_of(path[-1]) for path in paths if not any(is_stack(outer) for outer in path[1:-1])}
    if best and is_hugging_face(model) and not any(best[:2]) and len(kinds) > 1:
        return []
    return [path for path in paths if preference(path) == best]


def _several(model: nn.Module, names: Iterable[str]) -> str:
    return f"`module` must say which of the transformers in {type(model).__name__} is meant: {', '.join(names)}."


def _could_be(model: nn.Module) -> str:
    """The parts that have a stack of their own, to end an error with."""
    parts = [name for name, part in model.named_modules() if name and is_hugging_face(part) and _paths_to_blocks(part)]
    return f", which could be {', '.join(map(clean_name, parts))}" if parts else ""


def _is_list_of_blocks(path: tuple[nn.Module, ...]) -> bool:
    """Whether these are blocks, and not what a block consists of."""
    *above, found = path
    return is_stack(found) and not any(is_stack(outer) and len(blocks_of(outer)) > 1 for outer in above[1:])


def _has_linear(blocks: nn.Module) -> bool:
    # Conv1D: a linear layer of GPT-2.
    return any("Linear" in type(m).__name__ or type(m).__name__ == "Conv1D" for m in blocks.modules())


def _nearest(path: Sequence[nn.Module]) -> nn.Module | None:
    """The innermost model of transformers on a path."""
    return next((module for module in reversed(path) if is_hugging_face(module)), None)


def _depths(config: Any) -> set[int]:
    """Every number of layers that a config holds."""
    found: set[int] = set()
    for name, value in vars(config).items() if config is not None else ():
        if re.search(r"(layers?|depths?|blocks|block_sizes|blocks_per_stage)$", name):
            found |= {value} if isinstance(value, int) else set()
            if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
                found |= {len(value), sum(value)}
    return found


def _last_state(path: tuple[nn.Module, ...]) -> tuple[nn.Module, nn.Module]:
    """The module whose first output is the last hidden state, not what a head makes of it; and the transformer."""
    index = max(index for index, module in enumerate(path) if is_hugging_face(module))
    owner: Any = path[index]
    below = path[index + 1]
    # A model that has a decoder as well gives what that one returns.
    encoder = owner.get_encoder() if hasattr(owner, "get_encoder") else None
    is_decoded = getattr(owner.config, "is_encoder_decoder", False) and encoder in path[index + 1 :]
    if is_decoded or _has_head(owner, below):
        plain = path[index + 1 : -1]
        inside = [module for module in plain if _first_fields(module) & _STATES] or list(plain[-1:])
        return norm_after(owner, below) or (inside[0] if inside else blocks_of(path[-1])[-1]), owner
    # The final norm may be in the model around the one that has the blocks.
    while index and is_hugging_face(path[index - 1]) and not _has_head(path[index - 1], owner):
        following = after(path[index - 1], owner)
        if not following or not is_norm(following[0]):
            break
        index -= 1
        owner = path[index]
    return owner, owner


def _has_head(model: Any, branch: nn.Module) -> bool:
    """Whether a model of transformers gives more than hidden states; ``branch`` is the child that has the blocks."""
    first = _first_fields(model)
    if first:
        return first.isdisjoint(_STATES)
    if any(_HEAD.search(kind.__name__) for kind in type(model).__mro__):
        return True
    return any(isinstance(child, nn.Linear) for child in after(model, branch))


def _first_fields(model: nn.Module) -> set[str]:
    """The first fields of the outputs that a model says its forward returns, if it says so."""
    forward = type(model).forward
    names = re.findall(r"\w+", str(getattr(forward, "__annotations__", {}).get("return")))
    # Where the method was written: FSDP2 makes a class of its own of the model's.
    known = vars(sys.modules.get(getattr(forward, "__module__", ""), sys))
    kinds = [known[name] for name in names if isinstance(known.get(name), type)]
    return {fields(kind)[0].name for kind in kinds if is_dataclass(kind) and fields(kind)}


def _ends_of_post_norm(parent: Any, owner: nn.Module | None) -> tuple[nn.Module, ...]:
    """The modules that end each layer of XLM and Flaubert, whose layers are no modules: their last norms."""
    config = getattr(owner, "config", None)
    if all(hasattr(parent, name) for name in _XLM) and not getattr(config, "pre_norm", False):
        return blocks_of(parent.layer_norm2)
    raise ValueError(apart(parent))
