"""Full float32 precision for statistics, whatever autocast and TF32 settings the training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast, TF32 and bfloat16 off for matrix products on ``device``, and restore them afterwards."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_without_reduced_matmul(torch.backends.cuda.matmul))
        elif device.type == "cpu":
            stack.enter_context(_without_reduced_matmul(getattr(torch.backends.mkldnn, "matmul", None)))
        yield


def is_reduced_on_cpu() -> bool:
    """Whether the CPU may multiply float32 matrices in less, which threads that must not change it have to know."""
    backend: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest"
    return backend.fp32_precision not in ("none", "ieee")


@contextmanager
def _without_reduced_matmul(backend: object) -> Iterator[None]:
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
    if before in ("none", "ieee"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def statistics_dtype(hidden_states: Tensor) -> torch.dtype:
    """float64 input is kept; everything else is measured in float32."""
    return torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
