"""What each process does that evaluates several sets of pairs without a probe."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from matent_callbacks.transformers import AlignmentCallback
from tests.distributed.reading import as_if_launched
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.transformers.test_alignment_of_evaluations import KEY, Clip

NUM_PAIRS = 13
SETS = {"x": clip_examples(64)[3:23], "y": clip_examples(64)[30:50], "z": clip_examples(64)[40:60]}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The pairs of ``y`` cannot be found on the last rank."""
    as_if_launched(rank, world_size)
    in_parts = dist.new_group(list(range(world_size)))
    found = {}
    for name, group in (("whole", None), ("in parts", in_parts)):
        reads: list[str] = []

        def collate(examples: list[Any], reads: list[str] = reads) -> Any:
            if len(examples) == NUM_PAIRS:
                reads.append("pairs")
                if rank == world_size - 1 and examples[0] is SETS["y"][0]:
                    raise OSError("boom")
            return collate_pairs(examples)

        callback = AlignmentCallback(1, k=4, num_pairs=NUM_PAIRS, context_group=group)
        trainer = Clip(
            model=make_clip(),
            args=TrainingArguments(
                f"{folder}/{name}",
                max_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                learning_rate=0.0,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=clip_examples(32),
            eval_dataset=SETS,
            data_collator=collate,
            callbacks=[callback],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        records = trainer.state.log_history
        values = {key: value for record in records for key, value in record.items() if key.endswith(KEY)}
        told = [str(w.message) for w in caught if "Monitoring failed" in str(w.message)]
        found[name] = {"values": values, "told": told, "reads": len(reads)}
    return found
