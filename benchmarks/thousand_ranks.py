"""One rank of a world of 1,024, on one machine: what a reading of 80 layers of d = 8,192 sends, and holds.

torch's fake process group gives this rank a number and answers every collective at once; under `FakeTensorMode` tensors
have shapes and no values, so that they take no memory. The code that runs is that of a training step. *Numbers* and
*bytes* are what this rank passes to the collectives. *State* is held from the first forward to the end of the reading;
*peak* is the most beyond it. The step has 3 sequences of 3,072 tokens in bf16 on each data rank: with more than d
tokens the state is half of a covariance, and further tokens only change what is exchanged of each sequence. The rank
is in the middle of the world: if there are more ranks than layers, it decomposes none.

*Seconds* are the bytes that a rank sends in a ring (2 (W - 1) / W of an all-reduce, (W - 1) / W of a reduce or a
reduce-scatter) at a bandwidth as between machines, and as within one; the share is that of a step of 10 s.

The second table is a measurement by part, with the default `solver="auto"`. It is counted, not measured on a GPU: the
operations, at 40 TFLOP/s of float32 without tensor cores, divided by the *efficiency*: the rate of that part on this
machine over that of a large matrix product, both measured. Eigenvalues are no matrix products: half of their work reads
the matrix again for each of its columns, d^3 / 3 numbers, which is counted at 3 TB/s. That is their least time.
"""

from __future__ import annotations

import argparse
import statistics
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._markdown import begin, table
from benchmarks._stack import identities
from benchmarks._timing import interleaved
from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.symmetric import add_second_moment, blocks
from matent_callbacks.capture.meshes import ParallelGroups, parallel_groups
from matent_callbacks.functional._estimate import BLOCK, STEPS, estimates, project

POOLED = ("matrix_entropy", "effective_rank")
SEQUENCES = "sequence_matrix_entropy"
RANK = 515
# Name, bytes passed in and number of ranks of each collective.
Sent = list[tuple[str, int, int]]
SEQUENCES_OF_A_STEP, LENGTH = 3, 3072


class Strategy(NamedTuple):
    """How a model is trained in parallel."""

    name: str
    mesh: dict[str, int]
    """Names and sizes of its dimensions."""
    metrics: Any = POOLED
    split: int = 1
    """Number of ranks that a sequence of plain tensors is split over."""
    placement: Any = None
    """Of DTensors, along the tensor-parallel dimension; all ranks are one process group then."""


STRATEGIES = (
    Strategy("DDP, FSDP2, ZeRO", {"dp": 1024}),
    Strategy("the same, `rankme` as well", {"dp": 1024}, (*POOLED, "rankme")),
    Strategy("the same, per sequence", {"dp": 1024}, SEQUENCES),
    Strategy("tensor parallel: 128 x 8", {"dp": 128, "tp": 8}),
    Strategy("context parallel: 128 x 8", {"dp": 128, "cp": 8}, split=8),
    Strategy("the same, per sequence", {"dp": 128, "cp": 8}, SEQUENCES, split=8),
    Strategy("pipeline of 4 stages: 4 x 256", {"pp": 4, "dp": 256}),
    Strategy("`SequenceParallel`: DTensors over tokens, 128 x 8", {"dp": 128, "tp": 8}, placement=Shard(1)),
    Strategy("DTensors still to be summed, 128 x 8", {"dp": 128, "tp": 8}, placement=Partial()),
    Strategy("DTensors that all 8 have, 128 x 8", {"dp": 128, "tp": 8}, placement=Replicate()),
)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors alive, and their maximum.

    What DTensors send is added to ``sent``.
    """

    def __init__(self, sent: Sent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sent = sent
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # the CPU code checks whether all tokens count: yes
        if func.namespace == "_c10d_functional" and "wait" not in str(func):
            ranks = next(argument for argument in args if isinstance(argument, int))
            self._sent.append((func._schema.name.split("::")[1], args[0].numel() * args[0].itemsize, ranks))
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few layers: shows that it runs")
    quick = parser.parse_args().quick
    begin("One rank of 1,024", __doc__)
    layers, width = (4, 256) if quick else (80, 8192)
    collectives = ["collectives in the forward", "in the reading"]
    header = ["", *collectives, "bytes handed in", "state", "peak beyond it", "50 GB/s", "400 GB/s"]
    table(header, (measured(strategy, layers, width) for strategy in STRATEGIES))
    table(["part", "operations", "efficiency", "seconds", "of 10 s"], by_part(layers, width, 256 if quick else 2048))


def by_part(layers: int, width: int, measured_at: int) -> Iterator[list[str]]:
    """The time of each part of a measurement on one rank; rates are measured at another width."""
    d, tokens = measured_at, SEQUENCES_OF_A_STEP * LENGTH
    torch.manual_seed(0)
    z, packed = torch.randn(d, d), torch.zeros((d + 1) // 2, d + 1)
    add_second_moment(packed, z)
    products, seconds = {"large": 2 * d**3, "accumulate": 9 / 8 * d**3, "estimate": estimated_operations(d)}, {}
    ways: dict[str, Callable[[], Any]] = {
        "large": lambda: z @ z,
        "accumulate": lambda: add_second_moment(packed, z),
        "estimate": lambda: estimates([project(blocks(packed))], d),
    }
    for name, taken in interleaved(ways, rounds=7).items():
        seconds[name] = statistics.median(taken)
    rates = {name: products[name] / seconds[name] for name in ways}
    accumulated = 9 / 8 * tokens * width**2 * layers
    yield part(f"accumulate: {layers} layers, {tokens:,} tokens", accumulated, rates["accumulate"] / rates["large"])
    sent = layers * width * (width + 1) / 2 * 4
    yield [f"send to the owners: {sent / 2**30:.1f} GiB at 50 GB/s", "", "", *share(sent / 50e9)]
    for ranks in (1024, 8):
        own = max(1, layers // ranks)
        on = f"{own} layer{'s' if own > 1 else ''}: {ranks:,} ranks"
        operations = own * estimated_operations(width)
        yield part(f"decompose {on}, `auto`", operations, rates["estimate"] / rates["large"])
        yield [f"decompose {on}, `exact`", f"{own * 4 / 3 * width**3:.1e}", "", *share(own * width**3 / 3 * 4 / 3e12)]


def estimated_operations(width: int) -> float:
    return 2.0 * STEPS * BLOCK * width**2


def part(name: str, operations: float, efficiency: float) -> list[str]:
    return [name, f"{operations:.1e}", f"{efficiency:.2f}", *share(operations / 40e12 / efficiency)]


def share(seconds: float) -> list[str]:
    return [f"{seconds:.2g}", f"{seconds / 10:.2%}"]


@contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measured(strategy: Strategy, layers: int, width: int) -> list[str]:
    with world(RANK, 1024):
        return of_one_rank(strategy, layers, width)


def of_one_rank(strategy: Strategy, layers: int, width: int) -> list[str]:
    if "pp" in strategy.mesh:
        layers //= strategy.mesh["pp"]
    mesh = init_device_mesh("cpu", tuple(strategy.mesh.values()), mesh_dim_names=tuple(strategy.mesh))
    # Tokens of DTensors belong together along the tensor-parallel dimension, too.
    groups = parallel_groups(mesh) if strategy.placement is None else ParallelGroups()
    own = dict(metrics=strategy.metrics, solver="auto", **groups._asdict())
    monitor = EntropyMonitor(identities(layers), "*", **own)
    spread_over = None if strategy.placement is None else mesh["tp"]
    sent: Sent = []
    with FakeTensorMode(), answered(width), listening(sent), Held(sent) as held:
        monitor.reset()
        hidden = states(strategy, spread_over, width)
        before = held.now
        held.peak = held.now
        with monitor:
            monitor.model(hidden)
        in_forward = len(sent)
        state = held.now - before
        peak = held.peak - before
        held.peak = held.now
        monitor.compute()
        peak = max(peak, held.peak - before)
    return row(strategy, sent, in_forward, state, peak)


def states(strategy: Strategy, mesh: DeviceMesh | None, width: int) -> Tensor:
    shape = (SEQUENCES_OF_A_STEP, LENGTH // strategy.split, width)
    if mesh is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    local = list(shape)
    if isinstance(strategy.placement, Shard):
        local[1] //= mesh.size()
    own = torch.empty(local, dtype=torch.bfloat16)
    stride = (shape[1] * width, width, 1)
    return DTensor.from_local(own, mesh, [strategy.placement], run_check=False, shape=torch.Size(shape), stride=stride)


def row(strategy: Strategy, sent: Sent, in_forward: int, state: int, peak: int) -> list[str]:
    bytes_sent = sum(size for _, size, _ in sent)
    on_the_way = sum((1 + (name == "all_reduce")) * (ranks - 1) / ranks * size for name, size, ranks in sent)
    seconds = [on_the_way / (bandwidth * 1e9) for bandwidth in (50, 400)]
    return [
        strategy.name,
        *(named(part) for part in (sent[:in_forward], sent[in_forward:])),
        amount(bytes_sent),
        amount(state),
        amount(peak - state),
        *(f"{second:.2g} s = {second / 10:.1%}" for second in seconds),
    ]


def named(sent: Sent) -> str:
    counts = Counter(name for name, _, _ in sent)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def amount(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


@contextmanager
def listening(sent: Sent) -> Iterator[None]:
    """Record each collective, how many bytes this rank passes in, and how many ranks it has."""

    def listener(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() * tensor.itemsize, dist.get_world_size(group)))
            return original(tensor, *args, group=group, **kwargs)

        return collective

    patches = [mock.patch.object(dist, name, listener(name, getattr(dist, name))) for name in ("all_reduce", "reduce")]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def answered(width: int) -> Iterator[None]:
    """Answer what the code reads from tensors without values: that ranks agree, their width, and numbers to report."""

    def values(tensor: Tensor) -> Any:
        if tensor.ndim == 2:
            return [[width, -width, 1, 0]] * len(tensor)
        count = SEQUENCES_OF_A_STEP
        sizes = {5: [count, -count, width, -width, 0]}
        return sizes.get(len(tensor), [0] * len(tensor))

    with mock.patch.object(FakeTensor, "tolist", values):
        yield


if __name__ == "__main__":
    main()
