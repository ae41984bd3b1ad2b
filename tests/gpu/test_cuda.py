"""On a GPU: the same numbers as on the CPU. With ``--device cpu --small`` the CPU is in its place."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EffectiveRank, EntropyMonitor, LoopMonitor, MatrixEntropy
from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.functional._estimate import estimates, project
from tests.conftest import collate, llama, text_examples

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Numbers of", "ignore:All eigenvalues of")]

EVERY = tuple(CATALOGUE)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; `--device cpu --small` runs this on the CPU")
    return chosen


@pytest.fixture
def width(request: pytest.FixtureRequest) -> int:
    return 64 if request.config.getoption("--small") else 1024


def states(width: int, count: int = 24, length: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).pow(-0.3)
    return 3 + torch.randn(count, length, width, generator=generator) * scale


def measured(hidden: Tensor, device: torch.device, **arguments: Any) -> dict[str, float]:
    """Read hidden states of a model that does nothing else on ``device``."""
    model = nn.Sequential(nn.Sequential(nn.Identity(), nn.Linear(1, 1))).to(device)
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    monitor = EntropyMonitor(model, "0", **arguments)
    monitor.start(attention_mask=torch.ones(hidden.shape[:2], device=device))
    model(hidden.to(device))
    monitor.stop()
    return monitor.compute()


def assert_alike(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("solver", ["exact", "auto"])
@pytest.mark.parametrize("name", EVERY)
def test_each_metric_is_that_of_the_cpu(name, solver, device, width):
    hidden = states(width)
    # Eigenvalues above rounding are counted, so that rounding tells.
    tolerance = 0.02 if name in ("numerical_rank", "alpha_req", "embedding_alpha_req") else 2e-3
    found, expected = (measured(hidden, on, metrics=name, solver=solver) for on in (device, torch.device("cpu")))
    assert_alike(found, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_of_the_training_does_not_reach_the_statistics(dtype, device, width):
    hidden = states(width).to(dtype)
    metrics = ("matrix_entropy", "sequence_matrix_entropy", "correlation_effective_rank")
    expected = measured(hidden, torch.device("cpu"), metrics=metrics)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = measured(hidden, device, metrics=metrics)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_alike(found, expected, 1e-4)


def test_an_estimate_is_that_of_the_cpu_and_within_its_error(device, request):
    width = 1024 if request.config.getoption("--small") else 4096
    z = states(width, 1, 2 * width)[0] - 3
    matrix = z.T @ z
    found, expected = (estimates([project([matrix.to(on)])], width) for on in (device, torch.device("cpu")))
    exact = torch.special.entr(torch.linalg.eigvalsh(matrix.double() / matrix.double().trace())).sum().item()
    assert found.entropy.item() == pytest.approx(expected.entropy.item(), abs=3e-4)
    assert abs(found.entropy.item() - exact) <= 4 * found.error.item() < 0.002 * exact


def test_a_compiled_model_has_the_numbers_of_the_plain_one(device, request):
    batch = {name: value.to(device) for name, value in collate(text_examples(6)).items()}
    model = llama(dropout=0.0).to(device)
    compiled = torch.compile(model, backend="eager" if request.config.getoption("--small") else "inductor")
    found = []
    for own in (model, compiled):
        monitor = EntropyMonitor(own, layers="all")
        with monitor, torch.no_grad():
            own(**batch)
        found.append(monitor.compute())
    assert_alike(found[1], found[0], 1e-4)


@pytest.mark.parametrize("background", [False, True])
def test_a_loop_logs_the_numbers_of_the_cpu(background, device):
    logged: list[dict[str, float]] = []
    for on in (device, torch.device("cpu")):
        own = {name: value.to(on) for name, value in collate(text_examples(6)).items()}
        model = llama(dropout=0.0).to(on).train()
        values: dict[str, float] = {}
        with (
            LoopMonitor(
                model,
                1,
                "all",
                log=lambda found, step, own=values: own.update(found),
                background=background,
                on_error="raise",
            ) as monitor,
            monitor.step(1),
        ):
            model(**own).loss.backward()
        logged.append(values)
    assert len(logged[0]) == 8
    assert_alike(logged[0], logged[1], 1e-3)


@pytest.mark.parametrize("metric", [MatrixEntropy, EffectiveRank])
def test_a_metric_class_stays_on_its_device(metric, device, width):
    found = []
    for on in (device, torch.device("cpu")):
        own = metric().to(on)
        own.update(states(width).to(on), torch.ones(24, 50, device=on))
        value = own.compute()
        assert value.device.type == on.type
        found.append(value.item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("solver", ["exact", "auto"])
def test_a_profile_names_the_parts(solver, device, width):
    with torch.profiler.profile() as profile, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured(states(width), device, solver=solver)
    names = {event.key for event in profile.key_averages()}
    assert {f"matent_callbacks: {part}" for part in ("accumulate", "decompose", "wait")} <= names
