"""Which ranks belong together, by the mesh of a model or a Trainer: one rank of a world of eight that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from matent_callbacks.capture.meshes import ParallelGroups, mesh_of, parallel_groups
from tests.distributed.reading import small_llama

RANK = 5


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    yield
    dist.destroy_process_group()


def ranks(groups: ParallelGroups) -> tuple[list[int] | None, list[int] | None]:
    process, context = (None if group is None else dist.get_process_group_ranks(group) for group in groups)
    return process, context


@pytest.mark.parametrize(
    ("dimensions", "process", "context"),
    [
        ({"dp": 8}, None, None),
        ({"tp": 8}, None, None),
        ({"dp": 2, "tp": 4}, [1, 5], None),
        ({"dp": 8, "tp": 1}, None, None),
        ({"dp": 1, "tp": 8}, None, None),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, [1, 3, 5, 7], None),
        ({"dp_shard": 2, "cp": 4}, None, [4, 5, 6, 7]),
        ({"dp_shard": 2, "cp": 2, "tp": 2}, [1, 3, 5, 7], [5, 7]),
        ({"cp": 4, "tp": 2}, [1, 3, 5, 7], [1, 3, 5, 7]),
        ({"pp": 2, "fsdp": 4}, [4, 5, 6, 7], None),
        ({"pp": 2, "fsdp": 2, "tp": 2}, [5, 7], None),
        ({"pp": 2, "tp": 4}, [4, 5, 6, 7], None),
        ({"pp": 8}, [5], None),
        ({"data_parallel": 4, "tensor_parallel": 2}, [1, 3, 5, 7], None),
        ({"mine": 2, "tp": 4}, None, None),
    ],
)
def test_the_groups_of_a_mesh(dimensions, process, context):
    mesh = init_device_mesh("cpu", tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
    assert ranks(parallel_groups(mesh)) == (process, context)
    # Again, and by what owns it.
    assert ranks(parallel_groups(SimpleNamespace(device_mesh=mesh))) == (process, context)


def test_what_has_no_mesh_or_one_without_names():
    assert parallel_groups(small_llama()) == ParallelGroups()
    assert parallel_groups(init_device_mesh("cpu", (8,))) == ParallelGroups()


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", minversion="1.12")
    mesh = accelerate.ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, tp_size=2).build_device_mesh("cpu")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(torch_device_mesh=mesh), model=small_llama())
    assert ranks(parallel_groups(trainer)) == ([1, 3, 5, 7], None)
    split = accelerate.ParallelismConfig(dp_shard_size=4, cp_size=2).build_device_mesh("cpu")
    assert ranks(parallel_groups(split)) == (None, [4, 5])


def test_lightning():
    from lightning.fabric.strategies.model_parallel import _setup_device_mesh
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=2)
    not_set_up: Any = SimpleNamespace(strategy=strategy)
    assert mesh_of(not_set_up) is None
    mesh = strategy._device_mesh = _setup_device_mesh(4, 2, 8, torch.device("cpu"))
    assert mesh_of(not_set_up) is mesh
    assert ranks(parallel_groups(not_set_up)) == ([1, 3, 5, 7], None)
    module = LightningModule()
    module._device_mesh = mesh
    assert mesh_of(module) is mesh
    assert mesh_of(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)) is None


def test_transformers():
    model = small_llama()
    names = ("pp", "dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh("cpu", (1, 2, 2, 2), mesh_dim_names=names)
    model._device_mesh = mesh["fsdp", "tp"]
    model._mesh_manager = SimpleNamespace(_dense_mesh=mesh)
    assert ranks(parallel_groups(SimpleNamespace(model=model))) == ([1, 3, 5, 7], None)
    del model._mesh_manager
    assert ranks(parallel_groups(model)) == ([5, 7], None)
