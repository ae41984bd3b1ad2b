"""Reads the two towers of a dual encoder such as CLIP or SigLIP, or any two modules that encode one side of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.capture.inference import run
from matent_callbacks.capture.masks import allowed
from matent_callbacks.capture.stack import unwrap
from matent_callbacks.capture.values import first_tensor, named_arguments
from matent_callbacks.functional._precision import statistics_dtype


class Tower(NamedTuple):
    """The output of one tower for its side of the pairs."""

    hidden_states: Tensor
    """``(S, T, d)``: the tokens."""
    mask: Tensor
    """``(S, T)`` bool."""
    embedding: Tensor
    """``(S, d')``: one vector per sample, which is compared with the other tower's."""


def is_dual_encoder(model: nn.Module) -> bool:
    """Whether a model of transformers embeds images and texts side by side."""
    inner = unwrap(model)
    return hasattr(inner, "get_text_features") and hasattr(inner, "get_image_features")


def dual_encoder_towers(
    model: nn.Module, batch: Mapping[str, Any], names: tuple[str, str] | None = None
) -> tuple[Tower, Tower]:
    """Run a batch of pairs and read both towers.

    The embeddings of a pair are ``image_embeds`` and ``text_embeds`` where the model returns them, else the tower's
    ``pooler_output``, its output ``(S, d)``, or the mean of its tokens.

    Padding does not count: tokens that the mask hides which the tower is given, or the batch holds, for its tokens.

    Args:
        model: The model, wrapped or not.
        batch: What its forward takes; labels are not used.
        names: Paths of the image tower and the text tower; ``None``: those of a CLIP-like model.

    Raises:
        ValueError: If a tower is not there or was not called.
    """
    inner = unwrap(model)
    image_name, text_name = names or ("vision_model", "text_model")
    outputs: dict[str, Any] = {}
    given: dict[str, Mapping[str, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs[name], given[name] = output, named_arguments(module, args, kwargs)

        return hook

    towers = {}
    for name in (image_name, text_name):
        try:
            towers[name] = inner.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"`towers` asks for {name!r}, and {type(inner).__name__} has no such module.") from error
    whole: dict[str, Any] = {}
    handles = [tower.register_forward_hook(keep(name), with_kwargs=True) for name, tower in towers.items()]
    handles.append(inner.register_forward_hook(lambda module, args, output: whole.update(output=output)))
    try:
        run((inner,), {key: value for key, value in batch.items() if key not in ("labels", "return_loss")})
    finally:
        for handle in handles:
            handle.remove()
    masks = {
        image_name: [*_masks(given.get(image_name, {})), *(batch.get(name) for name in _IMAGE_MASKS)],
        text_name: [batch.get("attention_mask"), *_masks(given.get(text_name, {}))],
    }
    return (
        _tower(image_name, outputs, masks[image_name], _named(whole.get("output"), "image_embeds")),
        _tower(text_name, outputs, masks[text_name], _named(whole.get("output"), "text_embeds")),
    )


# Of the patches of images of several sizes.
_IMAGE_MASKS = ("pixel_attention_mask", "pixel_mask")


def _masks(arguments: Mapping[str, Any]) -> list[Tensor]:
    """Return the masks among the arguments of a tower, True for what counts."""
    found = []
    for name, value in arguments.items():
        if name.endswith("mask") and isinstance(value, Tensor) and value.ndim == 2:
            # Torch's own, which hides the keys, also stands behind other names.
            kind = "key_padding_mask" if name.endswith("key_padding_mask") else name
            found.append(allowed(value, kind, is_given=True))
    return found


def _tower(name: str, outputs: Mapping[str, Any], masks: Sequence[Any], embedding: Tensor | None) -> Tower:
    states = first_tensor(outputs.get(name))
    if states is None or states.ndim not in (2, 3):
        got = "nothing" if states is None else f"a tensor {tuple(states.shape)}"
        raise ValueError(f"`towers`: {name!r} must give (samples, tokens, d) or (samples, d), and gave {got}.")
    tokens = states if states.ndim == 3 else states.unsqueeze(1)
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    fitting = (mask for mask in masks if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2])
    if (mask := next(fitting, None)) is not None:
        valid = mask.to(tokens.device) > 0
    if embedding is None:
        embedding = _named(outputs[name], "pooler_output")
    return Tower(tokens, valid, mean_token(tokens, valid) if embedding is None else embedding)


def mean_token(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """``(S, T, d)`` to ``(S, d)``: the mean of the valid tokens of each sample, in the precision of statistics."""
    states = hidden_states.to(statistics_dtype(hidden_states))
    return torch.where(mask.unsqueeze(-1), states, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _named(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else None
    return value if isinstance(value, Tensor) else None
