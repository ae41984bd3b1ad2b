"""Words the warnings about layers that were not read, or were read with their padding."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from matent_callbacks.accumulate.reduction import global_rank
from matent_callbacks.capture.forward import Seen
from matent_callbacks.capture.layers import Layers
from matent_callbacks.capture.stack import ancestries, clean_name, unwrap

# The most names, or numbers of ranks, that a message lists.
_TOLD = 12


def how_ranks_differ(descriptions: Sequence[str], group: dist.ProcessGroup | None) -> str:
    """Explain in which settings the ranks of a group differ; each rank describes its own as a JSON object."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, description in enumerate(descriptions):
        ranks[description].append(global_rank(rank, group))
    settings = {description: json.loads(description) for description in ranks}
    first = settings[descriptions[0]]
    unlike = [name for name in first if any(own[name] != first[name] for own in settings.values())]
    sides = [
        f"{name} on rank {_listed(ranks[description])}: {_listed(own[name])}"
        for description, own in settings.items()
        for name in unlike
    ]
    return (
        f"There is no reading, since ranks differ in what they read: {'; '.join(sides)}. Training goes on. Where ranks "
        "hold other parts of a model, such as stages of a pipeline, `process_group=` says whose tokens belong together."
    )


def _listed(items: Any) -> str:
    items = [items] if isinstance(items, str) else [str(item) for item in items]
    more = f", ... ({len(items)} in all)" if len(items) > _TOLD else ""
    return ", ".join(items[:_TOLD]) + more


def why_unread(empty: Collection[str], seen: Seen, layers: Layers, model: nn.Module) -> str:
    """Explain why some layers have no reading, and which names would have one."""
    unread = f"so there is no reading of: {', '.join(empty)}."
    told = f"No valid token was seen, {unread}"
    silent = [key for key in empty if key not in seen.called]
    if not seen.ran and not seen.called:
        return (
            f"{told} No forward of {type(model).__name__} was watched: perhaps another module is run, such as a copy."
        )
    if not silent:
        if not seen.counted:
            return (
                f"{told} Their forwards are not counted: they were handed a key-value cache, or were not in training "
                "mode with gradients."
            )
        return f"Too few valid tokens or sequences were seen, {unread}"
    names = ", ".join(dict.fromkeys(_names_that_would_work(silent, seen, layers, model))) or "none that is known"
    return (
        f"{told} No forward of {', '.join(silent)} ran, although {type(model).__name__} was run: a module is not "
        "called where it is skipped, where only its weights are used, or where a fused kernel does its work. Names "
        f"that would have a reading: {names}."
    )


def _names_that_would_work(silent: Iterable[str], seen: Seen, layers: Layers, model: nn.Module) -> Iterator[str]:
    yield from (point.key for point in layers.points if point.key in seen.called)
    stack = layers.stack
    if stack is not None and stack.owner in seen.ran:
        yield from ("last", "all")
    inner = unwrap(model)
    names, above = {module: name for name, module in inner.named_modules()}, ancestries(inner)
    points = {point.key: point.module for point in layers.points}
    # For each, the nearest module around it that ran.
    around = (next((m for m in reversed(above.get(points[key], ())) if m in seen.ran), inner) for key in silent)
    yield from (clean_name(names[module]) for module in dict.fromkeys(around) if module is not inner)


def counted_padding(unmasked: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Explain which layers were read with their padding, and what to do: one message for each pair of lengths."""
    for lengths in dict.fromkeys(unmasked.values()):
        keys = [key for key, own in unmasked.items() if own == lengths]
        yield (
            f"Padding is counted in {', '.join(keys)}: the mask that the model is handed has length {lengths[0]}, the "
            f"hidden states have {lengths[1]}, and no module around them is handed one that fits. Pass that of the "
            "hidden states: `attention_mask=` of EntropyMonitor.start, or `mask=` of the callback."
        )
