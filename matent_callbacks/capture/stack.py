"""Finds the stack of transformer blocks inside a model, and the modules whose outputs are its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}


@dataclass(frozen=True)
class Stack:
    """The blocks of one transformer, in order, and the module whose output is the last hidden state."""

    blocks: tuple[nn.Module, ...]
    last: nn.Module
    owner: nn.Module
    """The transformer itself: the module that is given the attention mask."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under DDP, FSDP, ``torch.compile`` and PEFT wrappers."""
    inner: Any = trained_object(model)
    while hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = trained_object(inner.get_base_model())
    return inner  # type: ignore[no-any-return]


def trained_object(model: nn.Module) -> nn.Module:
    """What the user trains: the module under DDP, FSDP and ``torch.compile``, with PEFT still around it."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


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


def sequence_first(path: tuple[nn.Module, ...]) -> bool:
    """Whether the module at the end of a path takes and gives ``(T, B, d)``: modules of torch's own layers may."""
    for module in reversed(path):
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            module = module.layers[0]
        attention = getattr(module, "self_attn", None) if isinstance(module, TORCH_LAYERS) else module
        if isinstance(attention, nn.MultiheadAttention):
            return not attention.batch_first
    return False


def find_stack(model: nn.Module) -> Stack:
    """Find the one obvious stack of blocks in ``model``.

    Raises:
        ValueError: If there is none.
    """
    candidates = hugging_face_models(model)
    if len(candidates) > 1:
        raise ValueError(
            f"`module` must say which of the transformers in {type(model).__name__} is meant: {', '.join(candidates)}."
        )
    hugging_face = next(iter(candidates.values()), None)
    transformer = _language_model(hugging_face) if hugging_face else model
    found = _outermost_list(transformer, depth=getattr(getattr(transformer, "config", None), "num_hidden_layers", None))
    if found is None:
        raise ValueError(
            f"`layers` needs a stack of blocks (an nn.ModuleList or nn.Sequential), and none was found in "
            f"{type(model).__name__}. Pass module names or globs as `layers`, or the part to look in as `module`."
        )
    parent, blocks = found
    if hugging_face:
        return Stack(tuple(blocks.children()), last=transformer, owner=transformer)
    return Stack(tuple(blocks.children()), last=_last_of(parent, blocks), owner=parent)


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


def _language_model(model: Any) -> nn.Module:
    """What ``AutoModel`` would load: the module whose first output is the last hidden state of the language model."""
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder()  # type: ignore[no-any-return]
    decoder: nn.Module = model.get_decoder()
    if decoder is model:
        # Before 5.0, transformers only finds a decoder that is called `model` or `decoder`.
        return getattr(model, "text_model", model) if model.base_model is model else _language_model(model.base_model)
    return decoder


def _outermost_list(model: nn.Module, *, depth: int | None) -> tuple[nn.Module, nn.Module] | None:
    """Find the list of blocks on the outermost level that has one; experts and heads lie deeper.

    Of several, prefer one of length ``depth``, then one with linear layers, then the longest.
    """

    def preference(found: tuple[nn.Module, nn.Module]) -> tuple[bool, bool, int]:
        length = len(list(found[1].children()))
        return length == depth, any(isinstance(m, nn.Linear) for m in found[1].modules()), length

    level = [model]
    while level:
        lists = [
            (parent, child)
            for parent in level
            for child in parent.children()
            if isinstance(child, nn.ModuleList | nn.Sequential) and _is_stack(child)
        ]
        if lists:
            return max(lists, key=preference)
        level = [child for parent in level for child in parent.children()]
    return None


def _is_stack(blocks: nn.Module) -> bool:
    """Whether these are blocks: modules with children, all of one type except in an ``nn.ModuleList`` (hybrids)."""
    children = list(blocks.children())
    if not children or any(not list(child.children()) for child in children):
        return False
    kinds = {type(child) for child in children}
    return len(kinds) == 1 or isinstance(blocks, nn.ModuleList)


def _last_of(parent: nn.Module, blocks: nn.Module) -> nn.Module:
    """The norm that follows the blocks, in the order the modules were made; the last block where there is none."""
    siblings = list(parent.children())
    after = siblings[next(i for i, sibling in enumerate(siblings) if sibling is blocks) + 1 :]
    norms = [m for m in after if "norm" in type(m).__name__.lower()]
    return norms[0] if norms else list(blocks.children())[-1]
