"""A vision-language model's ordinary forward, image and text together: which tokens are what, and what is said of it.

Nothing here knows a model by name. What is relied on is ``get_image_features``, ``get_decoder`` and
``config.image_token_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.hooks import first_tensor
from matent_callbacks.functional.alignment import STAGES


def token_roles(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which tokens are image and which are text, ``(B, T)`` bool each; errors for batches that cannot be read."""
    image_token = getattr(getattr(model, "config", None), "image_token_id", None)
    if image_token is None or not hasattr(model, "get_image_features"):
        raise not_found(model, "vision_encoder", "it has no `get_image_features` or no `config.image_token_id`")
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"`input_ids` must be in the batch, a tensor (B, T), got {describe(ids)}.")
    if batch.get("pixel_values") is None:
        raise ValueError(f"`pixel_values` must be in the batch, since it is images that are read; got {sorted(batch)}.")
    if batch.get("pixel_values_videos") is not None:
        raise ValueError("`pixel_values_videos` must not be in the batch: images are read, and videos are not.")
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(f"`attention_mask` must have the shape of `input_ids`, {describe(ids)}, got {describe(mask)}.")
    is_image, valid = ids == image_token, mask > 0
    if not bool(is_image.any()):
        raise ValueError(f"`input_ids` must hold image tokens ({image_token}) for its `pixel_values`, got none.")
    if bool((is_image & ~valid).any()):
        raise ValueError(
            f"`attention_mask` must be 1 at every image token, got 0 at {int((is_image & ~valid).sum())} of them."
        )
    is_text = valid & ~is_image
    if not bool(is_text[is_image.any(1)].any()):
        raise ValueError(
            "`input_ids` must hold text beside the image tokens in at least one sample, got image tokens only."
        )
    return is_image, is_text


def language_model(model: Any) -> Any:
    """The part that takes the embeddings of image and text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder in (model, model.base_model):
        raise not_found(model, "image", "`get_decoder` gives no language model")
    return decoder


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Keyword arguments and output of each call of ``module``."""
    calls: list[tuple[dict[str, Any], Any]] = []
    handle = module.register_forward_hook(
        lambda _, __, kwargs, output: calls.append((kwargs, output)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def last_call(
    model: nn.Module, calls: list[tuple[dict[str, Any], Any]], shape: torch.Size
) -> tuple[dict[str, Any], Tensor]:
    """What the language model was given and the last hidden state it gave, ``(B, T, d)``, in the ordinary forward."""
    arguments, output = calls[-1] if calls else ({}, None)
    embeddings, states = arguments.get("inputs_embeds"), first_tensor(output)
    if not isinstance(embeddings, Tensor) or embeddings.shape[:-1] != shape:
        raise not_found(model, "image", f"its language model is given {describe(embeddings)} as `inputs_embeds`")
    if states is None or states.shape[:-1] != shape:
        raise not_found(model, "image_text", f"its language model gives {describe(states)} as last hidden state")
    return arguments, states


def not_found(model: nn.Module, stage: str, why: str) -> ValueError:
    """For a model that has no such stage."""
    return ValueError(
        f"Stage {stage!r} was not found in {type(model).__name__}: {why}. Pass `stages=`, a function that takes model "
        f"and batch and gives a `Stage` for each of {', '.join(STAGES)} and the number of samples it left out."
    )


def describe(value: object) -> str:
    """Its shape or its type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
