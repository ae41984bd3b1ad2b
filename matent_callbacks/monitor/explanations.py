"""Words the warnings about layers that were not read, numbers not defined, and padding that was read."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import nn

from matent_callbacks.accumulate.catalogue import Source, source_of
from matent_callbacks.accumulate.probe_tokens import TAKES
from matent_callbacks.accumulate.reduction import global_rank
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.capture.blocks import ancestries, clean_name
from matent_callbacks.capture.forward import Seen
from matent_callbacks.capture.labels import Unlabelled
from matent_callbacks.capture.layers import Layers
from matent_callbacks.capture.stack import unwrap

if TYPE_CHECKING:
    from matent_callbacks.monitor.readings import Readings
    from matent_callbacks.monitor.remembered import Remembered

# The most names, or numbers of ranks, that a message lists.
_TOLD = 12
_PASS_ONE = "Pass that of the hidden states: `attention_mask=` of EntropyMonitor.start, or `mask=` of the callback."

Cause = Literal["unwatched", "silent", "uncounted", "masked", "unlabelled", "all NaN", "too few", "not finite"]
"""Why a number is not defined."""

Undefined = tuple[str, str]
"""A layer, and the name of a number."""


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


def messages(
    readings: Readings,
    seen: Seen,
    remembered: Remembered,
    layers: Layers,
    model: nn.Module,
    *,
    failed_elsewhere: Collection[str],
) -> Iterator[str]:
    """Explain what a reading lacks and which layers count padding, as far as it was not explained before."""
    if readings.unlike:
        yield from remembered.untold("unlike", [readings.unlike])
        return
    if failed_elsewhere:
        names = ", ".join(sorted(failed_elsewhere))
        yield f"Left out, since ranks failed to read them or differ in their width: {names}."
    with_sinks = remembered.untold("sinks", readings.sinks)
    if with_sinks:
        yield left_out_sinks(with_sinks, list(readings.given), [readings.sinks[layer][1] for layer in with_sinks])
    yield from _solved(readings, remembered)
    for cause, undefined in _undefined_by_cause(readings, seen).items():
        new = remembered.untold(cause, undefined)
        # What broke off was told with its own error, and missing labels are told below.
        if new and not seen.broken_off and cause != "unlabelled":
            yield _why_undefined(cause, new, readings, seen, layers, model)
    new_layers = remembered.untold("padding", seen.unmasked)
    yield from _counted_padding({layer: seen.unmasked[layer] for layer in new_layers})
    new_layers = remembered.untold("perhaps masks", seen.perhaps_masks)
    yield from _perhaps_padding({layer: seen.perhaps_masks[layer] for layer in new_layers})
    new_layers = remembered.untold("labels", seen.unlabelled)
    yield from _without_labels({layer: seen.unlabelled[layer] for layer in new_layers}, model)


def _solved(readings: Readings, remembered: Remembered) -> Iterator[str]:
    """Say which layers are estimated, and why others are not although they are as wide."""
    layers = list(readings.given)
    estimated = remembered.untold("estimated", sorted(readings.estimated, key=layers.index))
    if estimated:
        yield (
            f"Numbers of {_listed(_in_ranges(estimated, layers))} are estimated, to 0.2 %, since they are wide. "
            'See the page "At scale" in the documentation. `solver="exact"` computes them from all eigenvalues.'
        )
    slow = remembered.untold("slow", readings.slow)
    if slow:
        wide = _listed(_in_ranges({layer for layer, _ in slow}, layers))
        names = _listed(sorted({name for _, name in slow}))
        yield (
            f"All eigenvalues of {wide} are computed, which takes long since these layers are wide: {names} cannot be "
            "estimated, and what comes from the same eigenvalues is not."
        )


def _undefined_by_cause(readings: Readings, seen: Seen) -> dict[Cause, list[Undefined]]:
    """Return the numbers that are NaN, by the reason."""
    found: dict[Cause, list[Undefined]] = defaultdict(list)
    for layer, values in readings.values.items():
        for name in [] if layer in readings.failed else [name for name, value in values.items() if math.isnan(value)]:
            found[_cause(layer, name, readings, seen)].append((layer, name))
    return found


def _cause(layer: str, name: str, readings: Readings, seen: Seen) -> Cause:
    source, given = _source(name), readings.given[layer]
    count = readings.counted[layer, source]
    if given == 0:
        if not seen.ran and not seen.called:
            return "unwatched"
        if layer not in seen.called:
            return "silent"
        if layer in seen.unlabelled:
            return "unlabelled"
        return "masked" if seen.counted else "uncounted"
    if count == 0 and readings.nonfinite[layer] >= given:
        return "all NaN"
    return "too few" if count < _takes(source)[0] else "not finite"


def _why_undefined(
    cause: Cause, undefined: Sequence[Undefined], readings: Readings, seen: Seen, layers: Layers, model: nn.Module
) -> str:
    """Explain why numbers are not defined, all for the same reason."""
    empty = list(dict.fromkeys(layer for layer, _ in undefined))
    names = list(dict.fromkeys(name for _, name in undefined))
    unread = f"so there is no reading of: {', '.join(empty)}."
    if any(not math.isnan(value) for layer in empty for value in readings.values[layer].values()):
        unread = f"so there is no {', '.join(names)} of: {', '.join(empty)}."
    if cause == "all NaN":
        alike: dict[int, list[str]] = defaultdict(list)
        for layer in empty:
            alike[readings.given[layer]].append(layer)
        each = (f"all {number} tokens are NaN or Inf in {', '.join(keys)}" for number, keys in alike.items())
        return f"No valid token was seen, {unread} Of those seen, {'; '.join(each)}."
    if cause == "not finite":
        return (
            f"The numbers that were computed are not finite, {unread} They are not defined for these tokens, such as "
            "the slope of a spectrum of one direction, or their squares are out of the range of the statistics' dtype."
        )
    if cause == "masked":
        return f"Too few valid tokens or sequences were seen, {unread}"
    if cause == "too few":
        needs: dict[str, list[str]] = defaultdict(list)
        for name in names:
            least, what = _takes(_source(name))
            noun, _, kind = what.partition(" ")
            fewest = min(readings.counted[layer, _source(name)] for layer, own in undefined if own == name)
            needed = f"{least} {noun}{'s' if least > 1 else ''} {kind}".strip()
            needs[f"at least {needed}, and {fewest} came"].append(name)
        bad = max(readings.nonfinite[layer] for layer in empty)
        return (
            f"Too few valid tokens or sequences were seen, {unread} It takes "
            + "; ".join(f"{needed} ({', '.join(own)})" for needed, own in needs.items())
            + (f"; {bad} tokens were left out since they are NaN or Inf" if bad else "")
            + ". Larger batches have more of them, and so have several steps that are read as one (`window_steps=`)."
        )
    return _why_unread(cause, empty, seen, layers, model)


def _source(name: str) -> Source:
    if name == "holevo_information":
        return "sequence_by_tokens"  # which takes more than the other of its two
    return source_of(name)


def _takes(source: Source) -> tuple[int, str]:
    return STATISTICS[source].takes if source in STATISTICS else TAKES


def _why_unread(cause: Cause, empty: Collection[str], seen: Seen, layers: Layers, model: nn.Module) -> str:
    """Explain why nothing of some layers was seen, and which names would have a reading."""
    unread = f"No valid token was seen, so there is no reading of: {', '.join(empty)}."
    if cause == "unwatched":
        return (
            f"{unread} No forward of {type(model).__name__} was watched: perhaps another module is run, such as a "
            "copy, or an error came before it."
        )
    if cause == "uncounted":
        return (
            f"{unread} Their forwards are not counted: they were handed a key-value cache, or had no gradients where "
            "only training is read."
        )
    names = ", ".join(dict.fromkeys(_names_that_would_work(empty, seen, layers, model))) or "none that is known"
    return (
        f"{unread} No forward of {', '.join(empty)} ran, although {type(model).__name__} was run: a module is not "
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


def left_out_sinks(
    some: Collection[str], layers: Sequence[str], ratios: Collection[float], *, switch: str = "`exclude_sinks=False`"
) -> str:
    """Say in which of ``layers`` sinks were left out, how many times as long they are, and what includes them."""
    least, most = f"{min(ratios):.0f}", f"{max(ratios):.0f}"
    times = most if least == most else f"{least} to {most}"
    return (
        f"Attention sinks, a few tokens that are {times} times as long as the others of their sequence, are left out "
        f"of the numbers of {_listed(_in_ranges(some, layers))}: these would describe them and nothing else. {switch} "
        "includes them. See the page on pretrained models in the documentation."
    )


def _in_ranges(some: Collection[str], layers: Sequence[str]) -> list[str]:
    """Name layers, in the order of all ``layers``, three or more in a row by the first and the last of them."""
    rows: list[list[str]] = [[]]
    for layer in layers:
        if layer in some:
            rows[-1].append(layer)
        else:
            rows.append([])
    return [name for row in rows for name in ([f"{row[0]} to {row[-1]}"] if len(row) > 2 else row)]


def _counted_padding(unmasked: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Explain which layers were read with their padding, and what to do: one message for each pair of lengths."""
    for lengths in dict.fromkeys(unmasked.values()):
        keys = [key for key, own in unmasked.items() if own == lengths]
        yield (
            f"Padding is counted in {', '.join(keys)}: the mask that the model is handed has length {lengths[0]}, the "
            f"hidden states have {lengths[1]}, and no module around them is handed one that fits. {_PASS_ONE}"
        )


def _perhaps_padding(named: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys(named.values()):
        keys = [key for key, own in named.items() if own == name]
        yield (
            f"Padding is counted in {', '.join(keys)}, if the argument {name!r} marks it: by its name it is not known "
            f"which tokens count. {_PASS_ONE}"
        )


def _without_labels(unlabelled: Mapping[str, Unlabelled], model: nn.Module) -> Iterator[str]:
    """Explain why labels do not tell which tokens of layers count, and what to do: one message for each reason."""
    forward = f"the forward of {type(unwrap(model)).__name__}"
    instead = (
        "Where the loss is computed outside of it, pass `labels=` to EntropyMonitor.start. Or pass a mask of the "
        'tokens to count, `attention_mask=` of EntropyMonitor.start or `mask=` of the callback, with `tokens="all"`.'
    )
    for why in dict.fromkeys(unlabelled.values()):
        reason, advice = {
            "none": (f"No `labels` came with {forward}", instead),
            "shifted": (
                f"Only `shift_labels` came with {forward}, which leave out the first token of a sequence or part",
                instead,
            ),
            "encoder": (
                "`labels` are of the decoder's tokens, and these layers are in the encoder",
                'Read the decoder, `module="decoder"`, or all tokens, `tokens="all"`.',
            ),
            "unfit": (
                f"The `labels` that came with {forward} have to be integers of the shape {why.tokens}, one for each "
                f"token of the hidden states, and are {why.labels}",
                instead,
            ),
        }[why.cause]
        layers = _listed([layer for layer, own in unlabelled.items() if own == why])
        yield f'{reason}, so with `tokens="labels"` there is no reading of it in: {layers}. {advice}'
