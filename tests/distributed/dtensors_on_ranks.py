"""What each process does in the tests of hidden states that are DTensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from matent_callbacks import EntropyMonitor
from tests.accumulate.test_reduction import Collectives
from tests.conftest import collate, text_examples
from tests.distributed.groups_on_ranks import METRICS, WIDTH
from tests.distributed.reading import small_llama

ON_A_LINE: dict[str, tuple[Any, ...]] = {
    "batch": (Shard(0),),
    "tokens": (Shard(1),),
    "features": (Shard(2),),
    "everywhere": (Replicate(),),
    "sums": (Partial(),),
}
ON_A_SQUARE: dict[str, tuple[Any, ...]] = {
    "batch, tokens": (Shard(0), Shard(1)),
    "tokens, features": (Shard(1), Shard(2)),
    "tokens, tokens": (Shard(1), Shard(1)),
    "everywhere, sums": (Replicate(), Partial()),
    "batch, everywhere": (Shard(0), Replicate()),
}


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes that no number of ranks divides; padding, and a token that is not finite."""
    hidden = 3 + torch.randn(3, 13, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[0, 9:], mask[1, :3] = 0, 0
    hidden[2, 4, 5] = torch.nan
    return hidden, mask


def of_one_sequence() -> torch.Tensor:
    """A mask of as many tokens as features: with fewer, RankMe has the square roots of rounding errors."""
    return (torch.arange(13) >= 13 - WIDTH).long()


def read(hidden: torch.Tensor, mask: torch.Tensor | None, **arguments: Any) -> dict[str, float]:
    model = nn.Sequential(nn.Identity())
    monitor = EntropyMonitor(model, layers="0", **{"metrics": METRICS, "dtype": torch.float64, **arguments})
    monitor.start(attention_mask=mask)
    model(hidden)
    monitor.stop()
    return monitor.compute()


def placed(hidden: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> DTensor:
    """A sum that is still to be made is that of two parts."""
    rests = [Replicate() if placement.is_partial() else placement for placement in placements]
    spread = distribute_tensor(hidden, mesh, rests)
    local = spread.to_local()
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            local = local * (0.25 if mesh.get_local_rank(dim) == 0 else 0.75)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=hidden.shape, stride=hidden.stride())


def spread(rank: int, world_size: int) -> dict[str, Any]:
    shapes = {2: ((2,), ON_A_LINE), 4: ((2, 2), ON_A_SQUARE)}
    shape, ways = shapes[world_size]
    mesh = init_device_mesh("cpu", shape)
    hidden, mask = whole()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="DTensor random operators")  # torch 2.6, of any tensor on a CPU
        for name, placements in ways.items():
            states = placed(hidden, mesh, placements)
            with Collectives() as collectives:
                values = read(states, mask)
            found[name] = {"values": values, "sent": collectives.sent}
        flat = placed(hidden[1], mesh, (*[Replicate()] * (len(shape) - 1), Shard(0)))
        found["one sequence"] = {"values": read(flat, of_one_sequence()), "sent": []}
    return found


def outside(rank: int, world_size: int) -> dict[str, float]:
    """Ranks 0 and 1 are one process group and rank 2 is another; each rank has a third of the tokens."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    hidden, mask = whole()
    mesh = init_device_mesh("cpu", (world_size,))
    return read(distribute_tensor(hidden, mesh, [Shard(1)]), mask, process_group=groups[rank // 2])


def packed_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([text_examples(1)[0]["input_ids"][:11]])
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(4), *range(7)]])}


def of_model(model: Any) -> list[dict[str, float]]:
    batches = (collate(text_examples(3)), packed_batch())
    del batches[0]["labels"]
    labelled = [batch | {"labels": batch["input_ids"].where(batch["input_ids"] % 4 > 0, -100)} for batch in batches]
    monitors = [EntropyMonitor(model, "all", metrics=METRICS, dtype=torch.float64, tokens=t) for t in ("all", "labels")]
    found = []
    for monitor, own in zip(monitors, (batches, labelled), strict=True):
        for batch in own:
            with monitor:
                model(**batch, use_cache=False)
            found.append(monitor.compute())
    return found


def sequence_parallel(rank: int, world_size: int) -> dict[str, Any]:
    """A model of transformers whose norms and residuals are spread over tokens."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = small_llama().eval()
    over_tokens = {"output_layouts": Shard(1), "use_local_output": False}
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **over_tokens),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for number in range(len(model.model.layers)):
        block = f"model.layers.{number}"
        plan |= {
            f"{block}.input_layernorm": SequenceParallel(),
            f"{block}.self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            f"{block}.self_attn.o_proj": RowwiseParallel(**over_tokens),
            f"{block}.post_attention_layernorm": SequenceParallel(),
            f"{block}.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            f"{block}.mlp.down_proj": RowwiseParallel(**over_tokens),
        }
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"{block}.{name}"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    kinds: set[str] = set()
    model.model.layers[0].register_forward_hook(lambda module, args, output: kinds.add(str(output.placements)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = of_model(model)
    return {"values": values, "kinds": kinds, "warnings": [str(w.message) for w in caught if "matent" in w.filename]}
