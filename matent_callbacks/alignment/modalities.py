"""Reads the image and the text tokens of a vision-language model in each layer of its language model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.alignment.joint_forward import JointForward, describe
from matent_callbacks.capture.layers import ReadPoint, resolve_layers
from matent_callbacks.capture.values import first_tensor


class Modalities(NamedTuple):
    """The tokens of a layer, on the host: those of all layers at once could be too many for a device."""

    image: Tensor
    """``(n, d)``."""
    text: Tensor
    """``(m, d)``."""


def layers_after_embeddings(language_model: nn.Module) -> tuple[ReadPoint, ...]:
    """Return where the hidden states of each block and of the final norm are read."""
    return resolve_layers(language_model, "all").points[1:]


def modalities_of(forward: JointForward) -> dict[str, Modalities]:
    """Run the forward, for the first time, and return the tokens of its samples that hold an image, by layer.

    Raises:
        ValueError: If the blocks of the language model are not found, or give no hidden states of this batch.
    """
    found: dict[str, Modalities] = {}
    image = forward.is_image
    text = forward.is_text & forward.has_image.unsqueeze(1)

    def keep(key: str, output: Any) -> None:
        states = first_tensor(output)
        if states is None or states.shape[:-1] != image.shape:
            raise ValueError(
                f"`mir` needs hidden states of {tuple(image.shape)} tokens after {key!r}, got {describe(states)}."
            )
        found[key] = Modalities(*(states[mask.to(states.device)].to("cpu") for mask in (image, text)))

    with ExitStack() as hooks:
        for point in layers_after_embeddings(forward.decoder):
            handle = point.module.register_forward_hook(lambda _, __, output, key=point.key: keep(key, output))
            hooks.callback(handle.remove)
        _ = forward.plain
    return found


def joined(tokens: list[Mapping[str, Modalities]]) -> dict[str, Modalities]:
    """Put the tokens of several batches together, layer by layer."""
    layers = tokens[0] if tokens else {}
    return {
        layer: Modalities(*map(torch.cat, zip(*(of_batch[layer] for of_batch in tokens), strict=True)))
        for layer in layers
    }
