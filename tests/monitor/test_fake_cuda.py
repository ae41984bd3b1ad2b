"""The way of hidden states on a GPU, without one: fake CUDA tensors, which know their device and have no values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matent_callbacks import EffectiveRank, EntropyMonitor, MatrixEntropy, SequenceEffectiveRank, SequenceMatrixEntropy
from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.functional import _estimate
from tests.versions import needs

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA build: no fake CUDA tensors"),
    # Run on 2.14; 2.6 wants a driver for them.
    needs("torch", "2.14"),
]

PACKED = [True, 2, 8]  # whether a batch is packed, how many documents it has, and how long the longest is


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: values that are asked for, and copies from it or to it.

    The values that are asked for are those of a packed batch, of two documents of eight tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
            return 0
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, output)) if isinstance(leaf, Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += len({tensor.device.type for tensor in tensors}) - 1
        return output


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(16, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Everything is made on a fake GPU."""
    counter = Waits()

    def values(tensor: Tensor) -> Any:
        counter.count += 1
        return PACKED if len(tensor) == len(PACKED) and not tensor.is_floating_point() else [0.0] * len(tensor)

    # torchmetrics copies the state that a metric begins with, and with it the mode that the state is made in.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode() as fake, torch.device("cuda"), counter:
        monkeypatch.setattr(FakeTensor, "tolist", values)
        assert fake is not None
        yield counter


def batch(kind: str) -> dict[str, Tensor]:
    found = {"input_ids": torch.zeros(4, 16, dtype=torch.int64)}
    if kind == "padded":
        found["attention_mask"] = torch.ones(4, 16, dtype=torch.int64)
    if kind == "packed":
        found["position_ids"] = torch.zeros(4, 16, dtype=torch.int64)
    return found


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("width", [12, 64, 640])
@pytest.mark.parametrize("metrics", [*CATALOGUE, tuple(CATALOGUE)], ids=lambda metrics: str(metrics)[:40])
def test_no_wait_in_a_forward_and_one_in_a_reading(waits, metrics, width, kind):
    model = Model(width)
    assert model.norm.weight.device.type == "cuda"
    monitor = EntropyMonitor(model, layers="all", metrics=metrics, max_tokens=100)
    waits.count = 0
    # The micro-batches of a step: their gradients add up.
    with monitor:
        for _ in range(2):
            model(**batch(kind)).sum()
    # Whether and how a batch is packed is asked once a forward.
    assert waits.count == (2 if kind == "packed" else 0)
    waits.count = 0
    model(**batch(kind)).sum()
    assert waits.count == 0
    monitor.compute()
    assert waits.count == 1


SERVED = tuple(name for name, row in CATALOGUE.items() if row.solver == "any" and row.source != "embedding")


@pytest.mark.parametrize("metrics", [("matrix_entropy", "effective_rank"), SERVED], ids=["the default", "all"])
def test_an_estimate_waits_once_too_and_each_layer_stays_where_it_is(waits, metrics, monkeypatch):
    devices = []
    product = _estimate.project

    def project(blocks: Any, **arguments: Any) -> Any:
        devices.append(blocks[0].device)
        return product(blocks, **arguments)

    monkeypatch.setattr("matent_callbacks.monitor.decomposition.project", project)

    class OnTwo(nn.Sequential):
        def forward(self, hidden: Tensor) -> Tensor:
            for layer in self:
                hidden = layer(hidden.to(layer[0].weight.device))
            return hidden

    model = OnTwo(*(nn.Sequential(nn.Linear(1024, 1024, device=f"cuda:{number}")) for number in (0, 1)))
    monitor = EntropyMonitor(model, layers=["0", "1"], metrics=metrics, solver="auto")
    with monitor:
        model(torch.zeros(4, 400, 1024))
    waits.count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor.compute()
    assert waits.count == 1
    assert set(devices) == {torch.device("cuda", 0), torch.device("cuda", 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("metric", [MatrixEntropy, EffectiveRank, SequenceMatrixEntropy, SequenceEffectiveRank])
def test_a_metric_class_waits_in_no_update(waits, metric, dtype):
    own = metric().to("cuda")
    waits.count = 0
    for _ in range(3):
        own.update(torch.randn(2, 16, 24, dtype=dtype), torch.ones(2, 16))
    assert waits.count == 0
    value = own.compute()
    assert value.device.type == "cuda"
    # Whether there was any token.
    assert waits.count == (metric in (MatrixEntropy, EffectiveRank))
