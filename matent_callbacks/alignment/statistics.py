"""Reads the batches of a probe of image-text pairs, and merges the statistics of all batches and ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.reduction import AllOrNone, all_reduce_sequence_means, all_reduce_sum, is_distributed
from matent_callbacks.accumulate.sequence_mean import (
    SequenceMean,
    empty_sequence_mean,
    merge_sequence_means,
    stage_mean,
)
from matent_callbacks.alignment.dual_encoder import dual_encoder_towers, mean_token
from matent_callbacks.alignment.image_exchange import Exchange, exchange_images
from matent_callbacks.alignment.joint_forward import JointForward, language_model
from matent_callbacks.alignment.modalities import Modalities, joined, layers_after_embeddings, modalities_of
from matent_callbacks.alignment.vision_language import Stage, StageReader, stages_of
from matent_callbacks.capture.inference import device_of
from matent_callbacks.functional._precision import statistics_dtype
from matent_callbacks.functional._tokens import check_stage
from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.functional.modality import modality_distance

Stages = StageReader | Mapping[str, Callable[[nn.Module, Any], Stage]]

EXCHANGED = tuple(f"exchanged/{name}" for name in ("image", "text", "image_text", "image_text_moved"))
"""The stages of the samples that exchanged images, and their ``image_text`` with the images moved on."""


class Counts(NamedTuple):
    """Numbers of samples and tokens, and losses: what adds up over batches and ranks."""

    text_only: Tensor
    exchanged: Tensor
    no_equal: Tensor
    """Samples with images that could not be exchanged with those of any other sample."""
    labels: Tensor
    """Label tokens of exchanged samples, over which both losses are summed."""
    nats: Tensor
    """Negative log-likelihood of these tokens with the samples' own images."""
    moved_nats: Tensor


class PairStatistics(NamedTuple):
    """What is read from some image-text samples."""

    entropies: dict[str, SequenceMean]
    """Of each stage or tower, and of ``EXCHANGED``."""
    image: Tensor
    """``(n, d)``: a vector for the image of each pair."""
    text: Tensor
    counts: Counts
    layers: Mapping[str, Modalities]
    """The tokens of both in each layer of the language model, if they are asked for."""


def read_vision_language(
    model: nn.Module,
    batch: Any,
    own: Stages | None,
    *,
    exchange: bool,
    layers: bool,
    warn_once: Callable[[str, str], None],
) -> PairStatistics:
    """Read a batch in a vision-language model.

    With ``exchange``, it is read again with its images moved on; with ``layers``, in all layers of the language model.
    """
    stages, text_only, exchanged, tokens = _read_stages(
        model, batch, own, exchange=exchange, layers=layers, warn_once=warn_once
    )
    image, text = stages["image"], stages["text"]
    entropies = {name: _entropy(stages[name]) for name in STAGES}
    counts = _counts(exchanged, text_only, device_of(model))
    if exchange:
        entropies |= _exchanged_entropies(stages, exchanged, entropies, model)
    both = text.mask.any(1)  # a sample of an image alone is no pair
    return PairStatistics(entropies, mean_token(*image)[both], mean_token(*text)[both], counts, tokens)


def read_dual_encoder(model: nn.Module, batch: Any, towers: tuple[str, str] | None) -> PairStatistics:
    """Read a batch in both towers."""
    image, text = dual_encoder_towers(model, batch, towers)
    entropies = {
        name: _entropy(Stage(tower.hidden_states, tower.mask))
        for name, tower in zip(TOWERS, (image, text), strict=True)
    }
    return PairStatistics(entropies, image.embedding, text.embedding, _counts(None, 0, device_of(model)), {})


def merged(statistics: Sequence[PairStatistics], names: Iterable[str], model: nn.Module) -> PairStatistics:
    """Merge the statistics of all batches; without any, those of no sample, with entropies of these names."""
    if not statistics:
        device = device_of(model)
        dtype = statistics_dtype(next(model.parameters(), torch.empty(0)))
        nothing = torch.zeros(0, 0, dtype=dtype, device=device)
        entropies = {name: empty_sequence_mean(dtype=dtype, device=device) for name in names}
        return PairStatistics(entropies, nothing, nothing, _counts(None, 0, device), {})
    entropies = {name: reduce(merge_sequence_means, (each.entropies[name] for each in statistics)) for name in names}
    for name, total in entropies.items():
        if name not in EXCHANGED and total.num_nonfinite:
            count = int(total.num_nonfinite)
            warnings.warn(f"{count} tokens of {name!r} are NaN or Inf; they are left out.", stacklevel=2)
    return PairStatistics(
        entropies,
        torch.cat([each.image for each in statistics]),
        torch.cat([each.text for each in statistics]),
        Counts(*(torch.stack(counts).sum(0) for counts in zip(*(each.counts for each in statistics), strict=True))),
        joined([each.layers for each in statistics]),
    )


def over_ranks(statistics: PairStatistics, group: dist.ProcessGroup | None) -> PairStatistics:
    """Merge the statistics of all ranks. Every rank calls this, whatever it has read."""
    means = all_reduce_sequence_means(list(statistics.entropies.values()), group)
    counts = Counts(*all_reduce_sum(torch.stack(statistics.counts), group))
    image, text = (torch.cat(all_gather_ragged(rows, group)) for rows in (statistics.image, statistics.text))
    return PairStatistics(dict(zip(statistics.entropies, means, strict=True)), image, text, counts, statistics.layers)


def distances_by_layer(
    layers: Mapping[str, Modalities], model: nn.Module, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Return how far image and text are apart in each layer, with the tokens of all ranks.

    One layer after the other is brought back to the device. Every rank calls this, whatever it has read.
    """
    device, groups = device_of(model), [group] if is_distributed(group) else []
    nothing = Modalities(torch.zeros(0, 0), torch.zeros(0, 0))
    found: dict[str, Tensor] = {}
    try:
        points = layers_after_embeddings(language_model(model))
    except ValueError:
        return found  # that was raised, or warned of, when a batch was read
    for point in points:
        with AllOrNone(device, groups, f"Another rank failed to bring back the tokens of {point.key!r}."):
            both = [rows.to(device) for rows in layers.get(point.key, nothing)]
        if groups:
            both = [torch.cat(all_gather_ragged(rows, group)) for rows in both]
        found[point.key] = modality_distance(*both)
        del both
    return found


def _read_stages(
    model: nn.Module,
    batch: Any,
    own: Stages | None,
    *,
    exchange: bool,
    layers: bool,
    warn_once: Callable[[str, str], None],
) -> tuple[dict[str, Stage], int, Exchange | None, dict[str, Modalities]]:
    if own is None:
        forward = JointForward(model, batch, with_labels=exchange)
        tokens = modalities_of(forward) if layers else {}
        stages, text_only = stages_of(forward)
        return stages, text_only, exchange_images(forward) if exchange else None, tokens

    stages, text_only = _read_own(model, batch, own, STAGES)
    exchanged, tokens = None, {}
    if exchange or layers:
        # A model that needs functions of its own may lack what these rely on.
        try:
            forward = JointForward(model, batch, with_labels=exchange)
            tokens = modalities_of(forward) if layers else {}
            if exchange:
                exchanged = exchange_images(
                    forward, lambda: _read_own(model, batch, own, ("image_text",))[0]["image_text"]
                )
        except Exception as error:
            why, _, _ = str(error).partition(". ")
            names = [*(("grounding", "image_text_shift") if exchange else ()), *(("mir",) if layers else ())]
            of_all = " and ".join(f"`alignment/{name}`" for name in names)
            warn_once("model", f"{of_all} {'are' if len(names) > 1 else 'is'} not logged. {why}.")
    return stages, text_only, exchanged, tokens


def _read_own(model: nn.Module, batch: Any, own: Stages, names: Iterable[str]) -> tuple[dict[str, Stage], int]:
    """Read stages with the user's functions."""
    if isinstance(own, Mapping):
        found, left_out = {name: own[name](model, batch) for name in names}, 0
    else:
        found, left_out = own(model, batch)
    return {name: Stage(*check_stage(name, *stage)) for name, stage in found.items()}, left_out


def _exchanged_entropies(
    stages: Mapping[str, Stage], exchange: Exchange | None, entropies: Mapping[str, SequenceMean], model: nn.Module
) -> dict[str, SequenceMean]:
    """Entropies of the samples that exchanged images, by the names in ``EXCHANGED``."""
    moved = None if exchange is None else exchange.image_text
    samples = None if exchange is None else exchange.exchanged
    if moved is None or samples is None or len(samples) != len(stages["image"].mask) or not bool(samples.any()):
        dtype = statistics_dtype(stages["image_text"].hidden_states)
        return {name: empty_sequence_mean(dtype=dtype, device=device_of(model)) for name in EXCHANGED}
    names = ("image", "text", "image_text")
    if bool(samples.all()):
        own = [entropies[name] for name in names]
    else:
        own = [_entropy(_of(samples, stages[name])) for name in names]
    return dict(zip(EXCHANGED, (*own, _entropy(_of(samples, moved))), strict=True))


def _of(samples: Tensor, stage: Stage) -> Stage:
    return Stage(stage.hidden_states[samples], stage.mask[samples])


def _counts(exchange: Exchange | None, text_only: int, device: torch.device) -> Counts:
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def number(value: Tensor | int) -> Tensor:
        return torch.as_tensor(value, device=device).to(dtype)

    if exchange is None:
        return Counts(number(text_only), *(number(0) for _ in Counts._fields[1:]))
    # Losses that are not finite belong to samples with NaN or Inf in their states, of which `merged` warns.
    usable = exchange.exchanged & torch.isfinite(exchange.nats) & torch.isfinite(exchange.moved_nats)
    sums = [torch.where(usable, each, 0).sum() for each in (exchange.num_labels, exchange.nats, exchange.moved_nats)]
    samples = [exchange.exchanged.sum(), (~exchange.exchanged).sum()]
    return Counts(number(text_only), *(number(value) for value in (*samples, *sums)))


def _entropy(stage: Stage) -> SequenceMean:
    return stage_mean(*stage, dtype=statistics_dtype(stage.hidden_states))
