"""Runs the ordinary forward of a vision-language model, image and text together, for all readings that use it.

Nothing here knows a model by name. It relies on ``get_image_features``, ``get_decoder`` and
``config.image_token_id``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matent_callbacks.capture.compiled import eagerly
from matent_callbacks.capture.inference import cheap_arguments, device_of, to_device
from matent_callbacks.capture.masks import NOT_COUNTED
from matent_callbacks.capture.stack import unwrap
from matent_callbacks.capture.values import first_tensor
from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional.alignment import STAGES


class Joint(NamedTuple):
    """What is read from one forward."""

    embeddings: Tensor
    """``(B, T, d)``: the input of the language model."""
    hidden_states: Tensor
    """``(B, T, d)``: its output, after its final norm."""
    arguments: Mapping[str, Any]
    """All keyword arguments of the language model."""
    nats: Tensor | None
    """``(B,)``: negative log-likelihood of the tokens that the labels count; None without labels or logits."""


class JointForward:
    """The ordinary forward of a model on a batch, run once as it is and again with something changed.

    Args:
        model: A vision-language model of transformers, wrapped or not.
        batch: What its forward takes.
        with_labels: Also compute the loss of the tokens that the ``labels`` ``(B, T)`` of the batch count, from logits
            for the end of the sequence that begins with the first of them.

    Raises:
        ValueError: If there are no images or no text at all, or the model has no such interface.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], *, with_labels: bool = False) -> None:
        self.model: Any = unwrap(model)
        device = device_of(self.model)
        batch = to_device(batch, device)
        labels = batch.get("labels") if with_labels else None
        # The loss of the model itself is not used, and would need logits for all tokens.
        self.batch = {key: value for key, value in batch.items() if key != "labels"}
        self.is_image, self.is_text = token_roles(self.model, self.batch)
        self.has_image = self.is_image.any(1)
        self._labels: Tensor | None = None
        if isinstance(labels, Tensor) and labels.shape == self.is_image.shape and bool(_counted(labels).any()):
            self._labels = labels

    @property
    def decoder(self) -> nn.Module:
        """The language model."""
        return language_model(self.model)

    @property
    def num_labels(self) -> Tensor:
        """``(B,)``: how many tokens the labels count."""
        if self._labels is None:
            return torch.zeros_like(self.has_image, dtype=torch.int64)
        return _counted(self._labels).sum(1)

    @functools.cached_property
    def plain(self) -> Joint:
        """The forward of the batch as it is, run on first use."""
        return self.run()

    def run(self) -> Joint:
        """Run the forward, with whatever hooks are in place."""
        arguments = cheap_arguments(self.model, self.batch)
        if self._labels is not None and "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = self._labels.shape[1] - int(_counted(self._labels).any(0).nonzero()[0])
        with eagerly(self.model), calls_of(self.decoder) as calls:
            output = self.model(**self.batch, **arguments)
        given, states = last_call(self.model, calls, self.is_image.shape)
        return Joint(given["inputs_embeds"], states, given, self._nats(output))

    def _nats(self, output: Any) -> Tensor | None:
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if self._labels is None or not isinstance(logits, Tensor) or logits.ndim != 3:
            return None
        labels = self._labels[:, self._labels.shape[1] - logits.shape[1] :].to(logits.device)
        counted = _counted(labels)
        # Sample by sample: float32 logits of a whole batch are large.
        nats = [
            F.cross_entropy(row[which].to(statistics_dtype(row)), targets[which], reduction="sum")
            for row, targets, which in zip(logits[:, :-1], labels[:, 1:], counted, strict=True)
        ]
        return torch.stack(nats).to(self.is_image.device)


def _counted(labels: Tensor) -> Tensor:
    """Which tokens count, ``(B, T - 1)`` bool; the first of a sequence is predicted from nothing and does not."""
    return labels[:, 1:] != NOT_COUNTED


def token_roles(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Find which tokens are image and which are text, ``(B, T)`` bool each; raise for batches that cannot be read."""
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


def language_model(model: Any) -> nn.Module:
    """Return the part that takes the embeddings of image and text, without wrappers."""
    model = unwrap(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder in (model, model.base_model):
        raise not_found(model, "image", "`get_decoder` gives no language model")
    return unwrap(decoder)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Record the keyword arguments and the output of each call of ``module``."""
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
    """Return the language model's arguments and last hidden state ``(B, T, d)`` in the ordinary forward."""
    arguments, output = calls[-1] if calls else ({}, None)
    embeddings, states = arguments.get("inputs_embeds"), first_tensor(output)
    if not isinstance(embeddings, Tensor) or embeddings.shape[:-1] != shape:
        raise not_found(model, "image", f"its language model is given {describe(embeddings)} as `inputs_embeds`")
    if states is None or states.shape[:-1] != shape:
        raise not_found(model, "image_text", f"its language model gives {describe(states)} as last hidden state")
    return arguments, states


def not_found(model: nn.Module, stage: str, why: str) -> ValueError:
    """Build the error for a model in which a stage was not found."""
    return ValueError(
        f"Stage {stage!r} was not found in {type(model).__name__}: {why}. Pass `stages=`, a function that takes model "
        f"and batch and gives a `Stage` for each of {', '.join(STAGES)} and the number of samples it left out."
    )


def describe(value: object) -> str:
    """Return the shape of a tensor, or the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
