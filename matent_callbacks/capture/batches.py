"""Tells batches that a model can be run on from what may be passed by mistake: raw rows, a data set, text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Arguments that models take as tensors only.
_TENSORS = frozenset(
    (
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "inputs_embeds", "pixel_values"),
        *("decoder_input_ids", "decoder_attention_mask", "input_values", "input_features"),
    )
)
_A_BATCH = "a mapping of the model's arguments to tensors, as the collator returns it, or a tensor"


def check_batch(batch: Any) -> None:
    """Raise ValueError unless it may be a batch: a tensor, or a mapping or sequence with tensors."""
    came = _mistaken(batch)
    if came is not None:
        raise ValueError(f"`batches` must hold batches as the model takes them: {_A_BATCH}; got {came}.")


def check_probe(probe: Any, name: str | None = None) -> None:
    """Raise ValueError unless it may be a batch, or a list of batches; ``name`` is that of one of several probes."""
    came = None
    if isinstance(probe, list | tuple):
        found = ((index, _mistaken(batch)) for index, batch in enumerate(probe))
        came = next((f"a {_kind(probe)} whose item {index} is {what}" for index, what in found if what), None)
    elif isinstance(probe, Tensor | Mapping):
        came = _mistaken(probe)
    else:
        came = f"a {_kind(probe)}"
    if came is not None:
        place = "" if name is None else f", as {name!r},"
        raise ValueError(
            f"`probe` must be a batch as the model takes it ({_A_BATCH}), a list of such batches, or a mapping of "
            f"names to them; got{place} {came}."
        )


def _mistaken(value: Any) -> str | None:
    """Describe what was passed in place of a batch; None if it may be one."""
    if isinstance(value, Tensor):
        return None
    if not _may_hold_tensor(value):
        within = f" without a tensor ({_contents(value)})" if isinstance(value, Mapping | list | tuple) else ""
        return f"a {_kind(value)}{within}"
    if isinstance(value, Mapping):
        for key, item in value.items():
            listed = key in _TENSORS and isinstance(item, list | tuple | str)
            if _is_source(item) or ((listed or hasattr(item, "__array__")) and not _may_hold_tensor(item)):
                return f"a {_kind(value)} whose {key!r} is a {_kind(item)}"
    return None


def _may_hold_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping | list | tuple):
        return any(map(_may_hold_tensor, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, str | bytes | int | float | complex | None) or _is_source(value):
        return False
    return not (hasattr(value, "__array__") or hasattr(value, "__array_interface__"))  # arrays, and pictures


def _is_source(value: Any) -> bool:
    """Whether it gives examples or batches, instead of being one."""
    of_datasets = type(value).__module__.partition(".")[0] == "datasets"
    return of_datasets or isinstance(value, DataLoader | Dataset | Iterator | range | set)


def _contents(value: Any) -> str:
    if isinstance(value, Mapping):
        kinds = [f"{key!r}: {_kind(item)}" for key, item in value.items()]
    else:
        kinds = list(dict.fromkeys(map(_kind, value)))
    return ", ".join([*kinds[:4], *(["..."] if len(kinds) > 4 else [])]) or "empty"


def _kind(value: Any) -> str:
    return type(value).__name__
