"""What each process of the FSDP2 tests does."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from matent_callbacks import EntropyMonitor
from matent_callbacks.lightning import MatrixEntropyCallback
from matent_callbacks.transformers import MatrixEntropyCallback as TrainerCallback
from tests.conftest import collate, text_examples
from tests.distributed import lightning_on_ranks, trainer_on_ranks
from tests.distributed.reading import as_if_launched, record_forwards, small_llama

METRICS = ("matrix_entropy", "rankme", "sequence_effective_rank")


def own_batches(rank: int) -> list[dict[str, Tensor]]:
    """Sizes and lengths of each rank's own; on rank 1 no token is valid."""
    batches = [collate(text_examples(2 + rank, 12 + 4 * rank, start=8 * rank + i)) for i in range(2)]
    if rank == 1:
        for batch in batches:
            batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    return batches


def probe() -> list[dict[str, Tensor]]:
    return [collate(text_examples(3, start=20)), collate(text_examples(2, start=30))]


def shard(model: Any, **where: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block, **where)
    return fully_shard(model, **where)


def in_own_loop(rank: int) -> dict[str, Any]:
    model = shard(small_llama())
    monitor = EntropyMonitor(model, layers="all", metrics=METRICS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with monitor:
        for batch in own_batches(rank):
            model(**batch).logits.square().mean().backward()
    forwards = monitor.compute()
    monitor.read(probe())
    probed = monitor.compute()
    optimizer.step()
    optimizer.zero_grad()
    # And once more, now that the forwards on the side have been in between.
    model(**own_batches(rank)[0]).logits.square().mean().backward()
    optimizer.step()
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {"forwards": forwards, "probed": probed, "sharded": sharded, "weights": whole(model)}


def whole(model: Any) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


class ShardedModule(lightning_on_ranks.Module):
    def configure_model(self) -> None:
        if not isinstance(self.model.lm_head.weight, DTensor):
            shard(self.model, mesh=self.device_mesh["data_parallel"])


def in_lightning(folder: str, world_size: int) -> dict[str, Any]:
    module = ShardedModule()
    seen = record_forwards(module.model)
    last, probed = lightning_on_ranks.Kept("matrix_entropy/last"), lightning_on_ranks.Kept("rankme/last")
    trainer = lightning_on_ranks.make_trainer(
        folder,
        world_size,
        [
            MatrixEntropyCallback(2),
            MatrixEntropyCallback(2, metrics="rankme", probe=probe()),
            last,
            probed,
        ],
        strategy=ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1),
    )
    trainer.fit(module, lightning_on_ranks.loader(16 * world_size))
    return {"steps": last.values, "probed": probed.values, "seen": seen, "weights": whole(module.model)}


class TrainerOfSharded(Trainer):
    """Accelerate shards on accelerators only: on CPU it leaves ``fsdp=True`` unheard and would put DDP around."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model


def in_trainer(folder: str) -> dict[str, Any]:
    model = shard(small_llama())
    before = whole(model)
    seen = record_forwards(model)
    callbacks = [TrainerCallback(2, layers="all"), TrainerCallback(2, metrics="rankme", probe=probe())]
    trainer = trainer_on_ranks.make_trainer(folder, callbacks, model=model, trainer=TrainerOfSharded)
    trainer.train()
    steps = [record for record in trainer.state.log_history if "matrix_entropy/last" in record]
    evaluated = trainer.evaluate(text_examples(13))
    weights = whole(model)
    trained = all((weights[name] != before[name]).any() for name in weights)
    return {"steps": steps, "seen": seen, "evaluated": evaluated, "trained": trained, "weights": weights}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    return {"loop": in_own_loop(rank), "lightning": in_lightning(folder, world_size), "trainer": in_trainer(folder)}
