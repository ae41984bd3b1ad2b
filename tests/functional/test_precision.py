"""Nothing is computed in less than float32, whichever way training was told to, and that is as before afterwards."""

from __future__ import annotations

import pytest
import torch

from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import finite_rows
from tests.functional.reduced import of_backend, of_process
from tests.versions import needs, older

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def matmul_is_full(device: torch.device) -> bool:
    if older("torch", "2.9"):
        return torch.get_float32_matmul_precision() == "highest"
    backend = torch.backends.cuda.matmul if device == CUDA else torch.backends.mkldnn.matmul
    return backend.fp32_precision in ("ieee", "none")


@pytest.mark.parametrize(("device", "precision"), [(CPU, "medium"), (CUDA, "high"), (CUDA, "medium")])
def test_a_precision_of_the_process_is_set_aside(device, precision):
    with of_process(precision):
        assert not matmul_is_full(device)
        with full_precision(device):
            assert matmul_is_full(device)
        assert not matmul_is_full(device)
    with pytest.raises(ZeroDivisionError), of_process(precision), full_precision(device):
        raise ZeroDivisionError
    assert matmul_is_full(device)


def test_tf32_that_was_allowed_for_cuda_is_set_aside():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with full_precision(CUDA):
            assert matmul_is_full(CUDA)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@needs("torch", "2.9")
@pytest.mark.parametrize(
    ("device", "backend", "precision"),
    [(CPU, "mkldnn", "bf16"), (CPU, "mkldnn", "tf32"), (CUDA, "cuda", "tf32")],
)
def test_a_precision_of_the_backend_is_set_aside(device, backend, precision):
    with of_backend(getattr(torch.backends, backend).matmul, precision):
        assert not matmul_is_full(device)
        with full_precision(device):
            assert matmul_is_full(device)


def test_products_inside_are_those_of_float32():
    """Seen in the numbers where this CPU computes with less."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    full = a @ b
    with of_process("medium"):
        if torch.equal(a @ b, full):
            pytest.skip("needs a CPU that multiplies in bfloat16")
        with full_precision(CPU):
            assert torch.equal(a @ b, full)
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(CPU):
            assert torch.equal(a @ b, full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_not_finite_if_a_feature_is_not_and_half_precision_does_not_overflow(dtype):
    rows = torch.full((4, 4096), 100.0, dtype=dtype)  # their sum is beyond float16
    rows[1, 7], rows[2, 0] = torch.nan, -torch.inf
    assert finite_rows(rows).tolist() == [True, False, False, True]
