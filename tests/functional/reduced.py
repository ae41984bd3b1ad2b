"""Matrix products of float32 computed in less, as a training may have them set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.versions import older


@contextmanager
def reduced_matmul() -> Iterator[None]:
    """In bfloat16, on a CPU that can; what is run inside must leave it so."""
    with of_process("medium") if older("torch", "2.9") else of_backend(torch.backends.mkldnn.matmul, "bf16"):
        yield


@contextmanager
def of_process(precision: str) -> Iterator[None]:
    """The one precision that torch before 2.9 has; in later ones it sets those of the backends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def of_backend(backend: Any, precision: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
        assert backend.fp32_precision == precision
    finally:
        backend.fp32_precision = before
