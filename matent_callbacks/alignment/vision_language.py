"""Reads image-text samples at five stages of a vision-language model, through the interface that all such models share.

Nothing here knows a model by name. It relies on ``get_image_features``, which returns the states of the vision encoder
and those after the connector; ``get_decoder``; and ``config.image_token_id``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from matent_callbacks.alignment.connector_inputs import as_taken, calls_of_parts
from matent_callbacks.alignment.joint_forward import JointForward, describe, not_found
from matent_callbacks.capture.compiled import eagerly
from matent_callbacks.capture.values import first_tensor
from matent_callbacks.functional.alignment import STAGES


class Stage(NamedTuple):
    """The hidden states of one stage: one row per sample, all its images together."""

    hidden_states: Tensor
    """``(S, T, d)``."""
    mask: Tensor
    """``(S, T)`` bool: False is padding, on whichever side."""


StageReader = Callable[[nn.Module, Mapping[str, Any]], tuple[dict[str, Stage], int]]
"""The type of :func:`vision_language_stages`, and of its replacement (``stages=``) for a model it cannot read."""


def vision_language_stages(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Stage], int]:
    """Read image-text samples where the paper does (Wei et al., arXiv 2401.17139, e1 to e5).

    ==================  =============================================================================================
    ``vision_encoder``  the image as the connector is seen to take it: of the layers that the model selects, without
                        the class token or padding that it drops. Where the connector is inside the encoder, that
                        follows from ``vision_feature_layer`` and ``vision_feature_select_strategy``
    ``connector``       the image as the language model takes it, with the row separators that some models put in
    ``image``           the image alone after the final norm of the language model
    ``text``            all that is not an image token, alone, after the final norm
    ``image_text``      both together: the model's ordinary forward, after the final norm
    ==================  =============================================================================================

    ``image`` and ``text`` are plain forwards of the language model on embeddings: positions from 0, its own attention
    mask, and the features that DeepStack adds to the image in deeper layers.

    Meant to be called in evaluation mode without gradients, as inside :func:`side_effect_free`. Builds no cache, and
    leaves no hook behind. NaN pixels give NaN states, in their own sample only.

    Args:
        model: A vision-language model of transformers, wrapped or not.
        batch: What its forward takes; ``input_ids`` ``(B, T)`` and ``pixel_values`` at least. Padding may be on
            either side. Labels are not used.

    Returns:
        A :class:`Stage` for each of ``STAGES``, with S the number of samples that hold an image, in their order; and
        the number of those left out because they hold none. A sample of images only has an empty row in ``text``.

    Raises:
        ValueError: If there are no images or no text at all, image tokens and image features do not match, or the
            model has no such stages.
    """
    return stages_of(JointForward(model, batch))


def stages_of(forward: JointForward) -> tuple[dict[str, Stage], int]:
    """:func:`vision_language_stages` on a forward that is shared with other readings."""
    is_image, is_text, has_image = forward.is_image, forward.is_text, forward.has_image
    with eagerly(forward.model):
        encoded, connected = _vision_stages(forward.model, forward.batch, is_image.sum(1).tolist())
        joint, decoder = forward.plain, forward.decoder
        embeddings, is_image, is_text = joint.embeddings[has_image], is_image[has_image], is_text[has_image]
        deep_features = joint.arguments.get("deepstack_visual_embeds")
        image = _through(decoder, _rows(embeddings, is_image), deep_features)
        text = _through(decoder, _rows(embeddings, is_text))
    together = Stage(joint.hidden_states[has_image], is_image | is_text)
    stages = dict(zip(STAGES, (encoded, connected, image, text, together), strict=True))
    return stages, int((~has_image).sum())


def _vision_stages(model: Any, batch: Mapping[str, Any], counts: Sequence[int]) -> tuple[Stage, Stage]:
    """The states before and after the connector; ``counts`` has the image tokens of each sample."""
    # The innermost model that knows it: outer ones may not name all the arguments.
    while model.base_model is not model and hasattr(model.base_model, "get_image_features"):
        model = model.base_model
    parameters = inspect.signature(model.get_image_features).parameters
    taken, as_output = set(parameters), {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        # Early releases of transformers 5 hand Pixtral's sizes on without naming them.
        taken, as_output = taken | {"image_sizes"}, {"return_dict": True}
    with calls_of_parts(model) as calls:
        features = model.get_image_features(**{k: v for k, v in batch.items() if k in taken}, **as_output)
    states, pooled = _encoder_states(features, model.config, batch), getattr(features, "pooler_output", None)
    if states is None:
        raise not_found(model, "vision_encoder", _why_no_states())
    if not isinstance(pooled, Tensor) and not (isinstance(pooled, Sequence) and len(pooled)):
        raise not_found(model, "connector", f"`get_image_features` gives {describe(pooled)} as `pooler_output`")
    # A unit is an image, or all images of a sample; in a tensor (tokens, d), which marks no borders, a token.
    units = [unit.reshape(-1, unit.shape[-1]) for unit in pooled]
    lengths = [len(unit) for unit in units]
    if sum(lengths) != sum(counts):
        raise ValueError(
            f"`input_ids` must hold as many image tokens as there are image features after the connector, "
            f"{sum(lengths)}, got {sum(counts)}."
        )
    ends = _ends_of_samples(lengths, counts)
    connected = _padded(torch.split_with_sizes(torch.cat(units), list(counts)))
    states, of_units = as_taken(model, calls, features, states, len(units))
    if of_units:
        of_samples = [of_units[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return _padded([torch.cat(own) for own in of_samples if own]), connected
    if isinstance(pooled, Tensor) or len(states) == 1:
        # Every image token stands for the same number of patches.
        patches = _shares(states.shape[0] * states.shape[1], counts)
    else:
        patches = None
        if rows := _rows_of_units(len(states), len(units), batch["pixel_values"]):
            patches = [sum(rows[start:end]) * states.shape[1] for start, end in zip([0, *ends], ends, strict=False)]
    if patches is None:
        raise not_found(
            model, "vision_encoder", f"it is not clear which of its states, {describe(states)}, belong to which sample"
        )
    encoded = torch.split_with_sizes(states.flatten(0, 1), patches)
    return _padded(encoded), connected


def _encoder_states(features: Any, config: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """``(rows, patches, d)``, by the config as the connector takes them; the images are one row if they are packed."""
    layer, strategy = (
        batch.get(name, getattr(config, name, None))
        for name in ("vision_feature_layer", "vision_feature_select_strategy")
    )
    if layer is None or getattr(features, "hidden_states", None) is None:
        states = getattr(features, "last_hidden_state", None)
    else:
        states = torch.cat([features.hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    if not isinstance(states, Tensor) or states.ndim not in (2, 3):
        return None
    states = states.unsqueeze(0) if states.ndim == 2 else states
    return states[:, 1:] if strategy == "default" else states


def _why_no_states() -> str:
    release = metadata.version("transformers") if "transformers" in sys.modules else "5"
    if int(release.split(".")[0]) < 5:
        return (
            f"it needs transformers 5.0 or newer, and in {release} `get_image_features` gives nothing from before the "
            "connector"
        )
    return "`get_image_features` gives no hidden states (rows, patches, d)"


def _ends_of_samples(lengths: Sequence[int], counts: Sequence[int]) -> list[int]:
    """For each sample, how many of the units (of ``lengths`` features) are in it and in the samples before it."""
    ends, found = list(accumulate(lengths)), []
    for sample, end in enumerate(accumulate(counts)):
        if end and end not in ends:
            raise ValueError(
                f"`input_ids` must hold the tokens of whole images in each sample, got {counts[sample]} in sample "
                f"{sample} where the images have {', '.join(map(str, lengths))}."
            )
        found.append(sum(e <= end for e in ends))
    return found


def _shares(total: int, counts: Sequence[int]) -> list[int] | None:
    """``total`` in proportion to ``counts``, or None if that is not in whole numbers."""
    shares = [divmod(count * total, sum(counts)) for count in counts]
    return None if any(rest for _, rest in shares) else [share for share, _ in shares]


def _rows_of_units(num_rows: int, num_units: int, pixel_values: Any) -> list[int] | None:
    """How many rows of the encoder each unit (an image, or all those of a sample) has, or None."""
    if isinstance(pixel_values, Tensor) and pixel_values.ndim == 5 and len(pixel_values) == num_units:
        # (units, tiles, C, H, W), padded with tiles of zeros that do not reach the encoder.
        tiles: list[int] = (pixel_values != 0).flatten(2).any(-1).sum(1).tolist()
        if sum(tiles) == num_rows:
            return tiles
    return [1] * num_units if num_rows == num_units else None


def _through(decoder: nn.Module, embeddings: Stage, deep_features: list[Tensor] | None = None) -> Stage:
    """The language model alone on embeddings; ``deep_features`` is what DeepStack adds to each image token later."""
    states, mask = embeddings
    deep = {"visual_pos_masks": mask, "deepstack_visual_embeds": deep_features} if deep_features else {}
    output = decoder(inputs_embeds=states, attention_mask=_attention_mask(decoder, embeddings), use_cache=False, **deep)
    last = first_tensor(output)
    assert last is not None  # it was there in the ordinary forward
    return Stage(last, mask)


def _attention_mask(decoder: nn.Module, embeddings: Stage) -> Tensor:
    """``(S, T)``, for the language model to make its own of."""
    states, mask = embeddings
    config = getattr(decoder, "config", None)
    both_ways = getattr(config, "use_bidirectional_attention", None) is True
    if both_ways and getattr(config, "_attn_implementation", None) in ("sdpa", "eager"):
        # The Gemma in PaliGemma is bidirectional, but would become causal as soon as there is padding.
        hidden = ~mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        return torch.zeros_like(hidden, dtype=states.dtype).masked_fill(hidden, torch.finfo(states.dtype).min)
    return mask.long()


def _rows(states: Tensor, mask: Tensor) -> Stage:
    """Keep the tokens of ``mask``, moved together to the left."""
    return _padded([row[chosen] for row, chosen in zip(states, mask, strict=True)], keep_empty=True)


def _padded(sequences: Sequence[Tensor], *, keep_empty: bool = False) -> Stage:
    """Pad sequences ``(n_i, d)`` on the right, one per row; empty ones are text-only samples."""
    kept = [s for s in sequences if keep_empty or len(s)]
    states = pad_sequence(kept, batch_first=True)
    lengths = torch.tensor([len(s) for s in kept], device=states.device)
    return Stage(states, torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1))
