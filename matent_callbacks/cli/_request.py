"""Checks the arguments of ``matent measure``, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from matent_callbacks.accumulate.catalogue import check_metrics
from matent_callbacks.cli._documents import STDIN, Text
from matent_callbacks.cli._entries import LEVEL
from matent_callbacks.cli._models import first_sentence
from matent_callbacks.cli._ranks import Ranks
from matent_callbacks.cli._state import REPLICATES
from matent_callbacks.cli.measure import Request

_NUMBERS_DEPEND_ON = ("max_length", "max_sequences", "batch_tokens", "untrained", "seed", "dtype")


def checked_settings(request: Request, text: Text) -> dict[str, Any]:
    """Return what the numbers depend on, as it is written into the results.

    Raises:
        ValueError: If no layer is named or a metric is not known.
    """
    metrics = _pieces(request.metrics or [])
    layers = [int(piece) if piece.lstrip("-").isdecimal() else piece for piece in _pieces(request.layers or ["last"])]
    if not layers:
        raise ValueError("--layers must name at least one layer.")
    return {
        "text": request.text,
        "text_bytes": text.size,
        "field": request.field,
        "layers": layers,
        "metrics": list(check_metrics(metrics)) if metrics else [],
        "embedding": request.embedding,
        **{name: getattr(request, name) for name in _NUMBERS_DEPEND_ON},
        "replicates": REPLICATES,
        "confidence": LEVEL,
    }


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
