"""Runs a batch with its images moved on by one sample, to see how much the text depends on its own image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matent_callbacks.alignment.joint_forward import JointForward
from matent_callbacks.alignment.vision_language import Stage
from matent_callbacks.capture.compiled import eagerly


class Exchange(NamedTuple):
    """A batch with its images moved on by one sample. One row for each sample with images, in their order."""

    exchanged: Tensor
    """``(S,)`` bool: the samples that got another's images. Those without a match kept their own."""
    image_text: Stage | None
    """Image and text together, as the stage of that name, with the images moved on; None where that cannot be read."""
    num_labels: Tensor
    """``(S,)``: number of tokens that the labels count; 0 without labels or logits."""
    nats: Tensor
    """``(S,)``: negative log-likelihood of these tokens with the sample's own images."""
    moved_nats: Tensor
    """``(S,)``: the same with the images moved on."""


def exchange_images(forward: JointForward, read: Callable[[], Stage] | None = None) -> Exchange:
    """Move the images of a batch on by one sample: i gets all the images of i + 1, and the last those of the first.

    Samples can only exchange images that take the same places: as many image tokens in each run of them, with the
    same relative positions where these have several dimensions (M-RoPE). If the images of all samples match, this is
    the plain rotation; otherwise each set of matching samples rotates separately, and a sample without a match keeps
    its own. Text-only samples stay as they are.

    What is exchanged are features in the input of the language model: the output of the connector, and what DeepStack
    adds in deeper layers. They depend on their own image only, so the result equals a forward with exchanged pixels,
    however the model family packs these.

    Args:
        forward: The forward to repeat, once.
        read: Reads image and text together in a forward of its own, for a model whose stages were not found; ``None``:
            after the final norm of the language model.
    """
    donors = _donors(forward.is_image, forward.plain.arguments.get("position_ids"))
    has_image = forward.has_image
    exchanged = torch.tensor([donor != sample for sample, donor in enumerate(donors)], device=has_image.device)
    with eagerly(forward.model), _images_of(donors, forward.decoder, forward.is_image) as calls:
        moved = forward.run()
        image_text: Stage | None = Stage(
            moved.hidden_states[has_image], (forward.is_image | forward.is_text)[has_image]
        )
        if read is not None:
            calls.clear()
            image_text = read()
            if not calls or len(image_text.mask) != int(has_image.sum()):
                image_text = None
    before, after = forward.plain.nats, moved.nats
    if before is None or after is None:
        nothing = torch.zeros(int(has_image.sum()), device=has_image.device)
        return Exchange(exchanged[has_image], image_text, nothing.long(), nothing, nothing)
    return Exchange(
        exchanged[has_image], image_text, forward.num_labels[has_image], before[has_image], after[has_image]
    )


def _donors(is_image: Tensor, position_ids: Any) -> list[int]:
    """Find whose images each sample gets: its own where no others fit."""
    equals: dict[Hashable, list[int]] = {}
    for sample, runs in enumerate(map(_runs, is_image.tolist())):
        if runs:
            equals.setdefault(_layout(sample, runs, position_ids), []).append(sample)
    donors = list(range(len(is_image)))
    for samples in equals.values():
        for sample, donor in zip(samples, samples[1:] + samples[:1], strict=True):
            donors[sample] = donor
    return donors


def _runs(is_image: Sequence[bool]) -> list[tuple[int, int]]:
    """Find begin and end of each run of image tokens."""
    edges = [i for i, (a, b) in enumerate(zip([False, *is_image], [*is_image, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _layout(sample: int, runs: list[tuple[int, int]], position_ids: Any) -> Hashable:
    """Return a key that is equal for samples whose images take the same places."""
    lengths = tuple(end - start for start, end in runs)
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 3:
        return lengths
    # (axes, B, T), M-RoPE: where in the picture a token is.
    positions = position_ids[:, sample]
    return lengths, *(str((positions[:, a:b] - positions[:, a : a + 1]).tolist()) for a, b in runs)


@contextmanager
def _images_of(donors: Sequence[int], decoder: nn.Module, is_image: Tensor) -> Iterator[list[bool]]:
    """Exchange the images in each call of the decoder; yields a list with an entry for each such call."""
    counts = is_image.sum(1).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    own = [torch.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    index = torch.cat([own[donor] for donor in donors]).to(is_image.device)
    calls: list[bool] = []

    def exchange(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeddings, deep = kwargs.get("inputs_embeds"), kwargs.get("deepstack_visual_embeds")
        if not isinstance(embeddings, Tensor) or embeddings.shape[:-1] != is_image.shape:
            return args, kwargs
        calls.append(True)
        moved = embeddings.clone()
        moved[is_image] = embeddings[is_image][index]
        kwargs = {**kwargs, "inputs_embeds": moved}
        if deep is not None:
            kwargs["deepstack_visual_embeds"] = [features[index] for features in deep]
        return args, kwargs

    handle = decoder.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
