"""Full float32 precision for statistics, whatever autocast and TF32 settings the training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast, TF32 and bfloat16 off for matrix products on ``device``, and restore them afterwards."""
    contexts: list[AbstractContextManager[Any]] = []
    if torch.is_autocast_enabled(device.type):
        contexts.append(torch.autocast(device.type, enabled=False))
    if device.type in ("cpu", "cuda"):
        backend = torch.backends.cuda.matmul if device.type == "cuda" else _matmul_on_cpu()
        if getattr(backend, "fp32_precision", "") not in ("none", "ieee"):
            contexts.append(_without_reduced_matmul(backend))
    return _inside(contexts) if contexts else nullcontext()


@contextmanager
def _inside(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def is_reduced_on_cpu() -> bool:
    """Whether the CPU may multiply float32 matrices in less, which threads that must not change it have to know."""
    backend = _matmul_on_cpu()
    if not hasattr(backend, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest"
    return backend.fp32_precision not in ("none", "ieee")


@contextmanager
def _without_reduced_matmul(backend: Any) -> Iterator[None]:
    # torch before 2.9 has one flag per process, later ones a precision per backend, and mixing both is an error.
    if not hasattr(backend, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _matmul_on_cpu() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


def statistics_dtype(hidden_states: Tensor) -> torch.dtype:
    """float64 input is kept; everything else is measured in float32."""
    return torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
