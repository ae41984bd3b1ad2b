"""Finds which ranks belong together from the device mesh of a model or of a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# As accelerate, Lightning, transformers and torchtitan name the dimensions of a mesh.
_OF_DATA = ("dp", "dp_replicate", "dp_shard", "data_parallel", "data", "ddp", "fsdp", "hsdp", "replicate", "shard")
_OF_CONTEXT = ("cp", "sp", "context_parallel", "sequence_parallel", "context", "sequence")
_OF_TENSORS = ("tp", "tensor_parallel", "tensor")
_OF_PIPELINE = ("pp", "pipeline_parallel", "pipeline")
_OF_TRAINER = (("accelerator", "torch_device_mesh"), ("strategy", "device_mesh"))
# In transformers: the second path leads to a mesh with all dimensions; the mesh of the third lacks that of replicas.
_OF_MODEL = (("device_mesh",), ("_mesh_manager", "_dense_mesh"), ("_device_mesh",))


class ParallelGroups(NamedTuple):
    """Process groups, as arguments of :class:`.EntropyMonitor`."""

    process_group: dist.ProcessGroup | None = None
    """The ranks whose tokens belong together; ``None``: all."""
    context_group: dist.ProcessGroup | None = None
    """Those of them that hold parts of the same sequences; ``None``: this rank holds whole sequences."""


def parallel_groups(owner: Any) -> ParallelGroups:
    """Find the process groups of this rank; new ones may be created, so every rank must call this at the same point.

    Tokens belong together along the data-parallel and context-parallel dimensions. Ranks along a tensor-parallel
    dimension hold the same tokens, so one of them is enough; without data and context parallelism all of them are
    taken. Ranks along a pipeline dimension hold other layers. If any dimension has no name, or an unknown one, all
    ranks are one group.

    Args:
        owner: A ``DeviceMesh``, or what has one: a transformers model (``device_mesh``), a Hugging Face ``Trainer``
            (accelerate's ``ParallelismConfig``), a Lightning ``Trainer`` (``ModelParallelStrategy``).

    Example:
        >>> import torch
        >>> from matent_callbacks import parallel_groups
        >>> parallel_groups(torch.nn.Linear(2, 2))  # it has no mesh: all ranks belong together
        ParallelGroups(process_group=None, context_group=None)
    """
    mesh = mesh_of(owner)
    names = [] if mesh is None else [name for name in mesh.mesh_dim_names or () if _size(mesh, name) > 1]
    if mesh is None or not set(names) <= {*_OF_DATA, *_OF_CONTEXT, *_OF_TENSORS, *_OF_PIPELINE}:
        return ParallelGroups()
    context = [name for name in names if name in _OF_CONTEXT]
    together = [name for name in names if name in _OF_DATA or name in context]
    if not together:
        together = [name for name in names if name in _OF_TENSORS]
    if not names or (mesh.size(None) == dist.get_world_size() and set(together) == set(names)):
        process_group = None
    elif together:
        process_group = _group_along(mesh, together)
    else:
        process_group, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    return ParallelGroups(process_group, _group_along(mesh, context) if context else None)


def mesh_of(owner: Any) -> DeviceMesh | None:
    """The device mesh of a model or a Trainer, if it has one."""
    from torch.distributed.device_mesh import DeviceMesh

    model = getattr(owner, "model", None)
    found = [owner, *(_attribute(owner, path) for path in (*_OF_TRAINER, *_OF_MODEL))]
    found += [_attribute(model, path) for path in _OF_MODEL]
    return next((mesh for mesh in found if isinstance(mesh, DeviceMesh)), None)


def _attribute(owner: Any, path: Sequence[str]) -> Any:
    for name in path:
        try:
            owner = getattr(owner, name, None)
        except (RuntimeError, AssertionError):  # Lightning's strategy before it is set up
            return None
    return owner


def _size(mesh: DeviceMesh, name: str) -> int:
    assert mesh.mesh_dim_names is not None
    return mesh.size(mesh.mesh_dim_names.index(name))


def _group_along(mesh: DeviceMesh, names: Sequence[str]) -> dist.ProcessGroup:
    if len(names) == 1:
        return mesh.get_group(names[0])
    # A mesh without other dimensions is used as it is: some versions of torch cannot slice a mesh that is a slice.
    along = mesh if mesh.mesh_dim_names == tuple(names) else mesh[tuple(names)]
    return along._flatten().get_group()
