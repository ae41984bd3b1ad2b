"""What each process of the tests of callbacks and process groups does."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback
from tests.distributed.reading import as_if_launched, record_forwards, small_llama
from tests.distributed.trainer_on_ranks import make_trainer
from tests.pairs import clip_examples, collate_pairs, make_clip


def train(folder: str, callback: MatrixEntropyCallback, mesh: Any = None) -> dict[str, Any]:
    model = small_llama()
    if mesh is not None:
        model.mesh = mesh
        type(model).device_mesh = property(lambda self: getattr(self, "mesh", None))
    trainer = make_trainer(folder, [callback], model=model, max_steps=2)
    seen = record_forwards(model)
    trainer.train()
    log = [record for record in trainer.state.log_history if "matrix_entropy/last" in record]
    return {"log": log, "seen": seen}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = [dist.new_group([other]) for other in range(world_size)][rank]
    pairs = collate_pairs(clip_examples(16)[4 * rank :][:4])
    alignment = AlignmentCallback(1, probe=pairs, process_group=own, pair_measures=["cka"])
    return {
        "by mesh": train(folder, MatrixEntropyCallback(1, layers="all"), mesh),
        "given": train(folder, MatrixEntropyCallback(1, layers="all", process_group=own)),
        "alignment": alignment._alignment.measure(make_clip()),
        "pairs": pairs,
    }
