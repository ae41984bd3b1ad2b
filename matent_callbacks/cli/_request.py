"""Checks the arguments of ``matent measure``, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from matent_callbacks.accumulate.catalogue import check_metrics
from matent_callbacks.cli._adapters import is_path
from matent_callbacks.cli._documents import STDIN, Text
from matent_callbacks.cli._entries import LEVEL
from matent_callbacks.cli._models import first_sentence
from matent_callbacks.cli._ranks import Ranks
from matent_callbacks.cli._state import REPLICATES
from matent_callbacks.cli.measure import Request

_NUMBERS_DEPEND_ON = ("max_length", "max_sequences", "batch_tokens", "include_sinks", "untrained", "seed", "dtype")

_NO_REFERENCE = "the callbacks log it in training, with `reference` and `probe`"


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
        "metrics": list(check_metrics(metrics, no_reference=_NO_REFERENCE)) if metrics else [],
        "embedding": request.embedding,
        **{name: getattr(request, name) for name in _NUMBERS_DEPEND_ON},
        "baseline": request.baseline,
        "replicates": REPLICATES,
        "confidence": LEVEL,
    }


def models_of(request: Request) -> list[str]:
    """Return the models to measure, each once, the baseline first."""
    names = ([request.baseline] if request.baseline is not None else []) + request.models
    return list({str(Path(name).resolve()) if is_path(name) else name: name for name in reversed(names)}.values())[::-1]


def check_paths(request: Request, ranks: Ranks) -> None:
    """Raise ValueError for an impossible model, device map or path, before anything is loaded."""
    if request.text == STDIN and ranks.size > 1:
        raise ValueError("--text must be a file or a folder under torchrun: stdin cannot be shared out over ranks.")
    if request.device_map is not None and (request.device is not None or ranks.size > 1):
        raise ValueError("--device-map spreads one model over all devices: leave out --device, and torchrun.")
    for model in request.models:
        if is_path(model) and not Path(model).is_dir():
            raise ValueError(f"MODEL must be a folder or a name on the hub, and {model} is no folder.")
    if request.baseline is not None and is_path(request.baseline) and not Path(request.baseline).is_dir():
        raise ValueError(f"--baseline must be a folder or a name on the hub, and {request.baseline} is no folder.")
    if request.baseline is not None and len(models_of(request)) == 1:
        raise ValueError(f"--baseline is what MODEL is compared with, and both are {request.baseline}.")
    for option, path in (("--out", request.out), ("--plot", request.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} is to be in {path.absolute().parent}, and there is no such folder.")
        if path is not None and path.is_dir():
            raise ValueError(f"{option} must be a file, and {path} is a folder.")
    if request.plot is not None:
        _check_picture(request.plot)


def _check_picture(path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("--plot needs matplotlib: pip install 'matent-callbacks[plot]'") from error
    matplotlib.use("agg")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.lower().removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot must be a picture, like .png, .svg or .pdf, and is {path}.")


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
