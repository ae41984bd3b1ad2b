"""The arguments of ``matent measure``, checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from matent_callbacks.accumulate.catalogue import check_embedding, check_metrics
from matent_callbacks.cli._documents import STDIN, Text
from matent_callbacks.cli._models import first_sentence
from matent_callbacks.cli._ranks import Ranks
from matent_callbacks.cli._results import Settings


class Request(NamedTuple):
    """The arguments of the command line."""

    models: list[str]
    text: str
    field: str | None
    layers: list[str]
    metrics: list[str]
    embedding: str
    max_length: int
    max_sequences: int | None
    batch_tokens: int
    untrained: bool
    seed: int
    dtype: str
    device: str | None
    device_map: str | None
    out: Path | None
    trust_remote_code: bool
    allow_pickle: bool


def checked_settings(request: Request, text: Text) -> Settings:
    """Return the settings that the numbers depend on.

    Raises:
        ValueError: If no layer is named or a metric is not known.
    """
    metrics = _pieces(request.metrics)
    layers = [int(piece) if piece.lstrip("-").isdecimal() else piece for piece in _pieces(request.layers)]
    if not layers:
        raise ValueError("--layers must name at least one layer.")
    return Settings(
        text=request.text,
        text_bytes=text.size,
        field=request.field,
        layers=layers,
        metrics=list(check_metrics(metrics)) if metrics else [],
        embedding=check_embedding(request.embedding),
        max_length=request.max_length,
        max_sequences=request.max_sequences,
        batch_tokens=request.batch_tokens,
        untrained=request.untrained,
        seed=request.seed,
        dtype=request.dtype,
    )


def check_paths(request: Request, ranks: Ranks) -> None:
    """Raise ValueError for an impossible model, device map or path, before anything is loaded."""
    if request.text == STDIN and ranks.size > 1:
        raise ValueError("--text must be a file or a folder under torchrun: stdin cannot be shared out over ranks.")
    if request.device_map is not None and (request.device is not None or ranks.size > 1):
        raise ValueError("--device-map spreads one model over all devices: leave out --device, and torchrun.")
    for model in request.models:
        is_path = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
        if is_path and not Path(model).is_dir():
            raise ValueError(f"MODEL must be a folder or a name on the hub, and {model} is no folder.")
    if request.out is not None and not request.out.absolute().parent.is_dir():
        raise ValueError(f"--out is to be in {request.out.absolute().parent}, and there is no such folder.")
    if request.out is not None and request.out.is_dir():
        raise ValueError(f"--out must be a file, and {request.out} is a folder.")


def checked_device(name: str | None, ranks: Ranks) -> str:
    """Return the device asked for, or else a GPU (this rank's own) if there is one, or the CPU.

    Raises:
        ValueError: If the device asked for does not exist.
    """
    if name is None:
        if torch.cuda.is_available():
            return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device must be one that is here, got {name!r} ({first_sentence(error)}).") from error
    return name


def _pieces(values: Iterable[str]) -> list[str]:
    return [piece.strip() for value in values for piece in value.split(",") if piece.strip()]
