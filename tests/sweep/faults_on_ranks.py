"""What each process of the tests of failures on one rank does."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch.serialization import register_package

from matent_callbacks import EntropyMonitor, PlateauDetector
from matent_callbacks.alignment import first_pairs
from matent_callbacks.alignment.measurement import AlignmentMeasurement
from matent_callbacks.callbacks.layer_pictures import LayerPictures
from matent_callbacks.callbacks.measurement import Measurement
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.lightning import AlignmentCallback as LightningAlignment
from matent_callbacks.lightning import MatrixEntropyCallback as LightningCallback
from matent_callbacks.lightning import PlateauStopping as LightningStopping
from matent_callbacks.lightning import _matrix_entropy as lightning_entropy
from matent_callbacks.monitor.recording import Recording
from matent_callbacks.transformers import (
    AlignmentCallback,
    MatrixEntropyCallback,
    _measuring,
)
from matent_callbacks.transformers import _matrix_entropy as trainer_entropy
from tests.conftest import collate, text_examples
from tests.distributed import lightning_on_ranks, trainer_on_ranks
from tests.distributed.reading import as_if_launched, small_llama

Outcome = tuple[int, float, int]
"""Steps made, a sum of the weights, and warnings of what failed."""


def embedded(model: Any, batch: Any) -> Any:
    return model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]


def probe() -> Any:
    return collate(text_examples(4, start=40))


# What fails, in runs with which arguments.
ENTROPY: dict[str, tuple[list[tuple[Any, str]], dict[str, Any]]] = {
    "start": ([(EntropyMonitor, "start")], {}),
    "stop": ([(EntropyMonitor, "stop")], {}),
    "record": ([(Recording, "record")], {}),
    "probe": ([(EntropyMonitor, "read")], {"probe": probe(), "reference": "start"}),
    "saved state": ([(Measurement, "state_dict")], {"probe": probe(), "reference": "start"}),
    "loaded state": ([(Measurement, "load_state_dict")], {"probe": probe(), "reference": "start"}),
    "pictures": ([(LayerPictures, "draw")], {"layers": "all"}),
}
OF_TRAINER = {
    "samples": ([(trainer_entropy, "counted_samples")], {}),
    "evaluation begins": ([(Measurement, "begin_evaluation")], {}),
    "late record": ([(trainer_entropy, "log_record")], {"background": True}),
    "own record": ([(_measuring, "log_record")], {}),
}
OF_LIGHTNING = {
    "reset": ([(Measurement, "reset")], {}),
    "samples": ([(lightning_entropy, "counted_samples")], {}),
    "log": ([(LightningModule, "log_dict")], {}),
    "publish": ([(lightning_entropy, "publish")], {"background": True}),
}


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


fails.log = fails  # as a Trainer class

# Accelerate has the ranks of a CPU load their checkpoints to `cpu:0`, which torch 2.6 does not know.
register_package(99, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None)


@contextmanager
def broken(places: list[tuple[Any, str]], here: bool) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patches = [mock.patch.object(owner, name, fails) for owner, name in places] if here else []
        for patch in patches:
            patch.start()
        try:
            yield caught
        finally:
            for patch in patches:
                patch.stop()


def total(model: Any) -> float:
    return sum(value.double().sum().item() for value in model.state_dict().values())


def by_trainer(folder: str, callbacks: list[Any]) -> tuple[int, float]:
    """Train, resume and evaluate."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    for resume in (False, True):
        trainer = trainer_on_ranks.make_trainer(
            folder, callbacks, model=small_llama(), max_steps=4 if resume else 2, **saving
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate(text_examples(10))
    return trainer.state.global_step, total(trainer.model)


def by_lightning(folder: str, world_size: int, callbacks: list[Any]) -> tuple[int, float]:
    """Train and validate, and resume."""
    path = None
    for epochs in (1, 2):
        module = lightning_on_ranks.Module()
        trainer = lightning_on_ranks.make_trainer(
            folder, world_size, callbacks, max_steps=-1, max_epochs=epochs, logger=CSVLogger(folder)
        )
        trainer.fit(module, lightning_on_ranks.loader(8 * world_size), lightning_on_ranks.loader(13), ckpt_path=path)
        path = f"{folder}/{epochs}.ckpt"
        trainer.save_checkpoint(path)
    return trainer.global_step, total(module.model)


def over_places(
    places: dict[str, Any], here: bool, run: Callable[[dict[str, Any]], tuple[int, float]]
) -> dict[str, Outcome]:
    outcomes = {}
    for name, (failing, arguments) in places.items():
        with broken(failing, here) as caught:
            steps, weights = run(arguments)
        outcomes[name] = steps, weights, len({str(w.message) for w in caught if "boom" in str(w.message)})
    return outcomes


def alignment_fails(here: bool, run: Callable[[list[Any]], tuple[int, float]], callback: type) -> dict[str, Any]:
    """The second reading of the probe fails; then it cannot be found when training begins."""
    stages, read, reads = dict.fromkeys(STAGES, embedded), AlignmentMeasurement._read, []

    def fails_later(*args: Any) -> Any:
        reads.append(1)
        return fails() if here and len(reads) == 2 else read(*args)

    with broken([], here) as caught, mock.patch.object(AlignmentMeasurement, "_read", fails_later):
        later = run([callback(1, stages=stages, pair_measures=[], probe=probe())])
    told = any("boom" in str(w.message) or "Another rank failed" in str(w.message) for w in caught)
    with broken([(first_pairs, "first_batch")], here):
        try:
            run([callback(1, stages=stages, pair_measures=[])])
            at_start = ""
        except RuntimeError as error:
            at_start = str(error)
    return {"later": (*later, int(told)), "at start": at_start}


def lightning_stops(folder: str, here: bool, world_size: int) -> int:
    """The rank that cannot observe stops with the others."""
    callbacks = [
        LightningCallback(1, probe=probe()),
        LightningStopping("matrix_entropy/last", min_delta=99.0, patience=1, mode="any", verbose=False),
    ]
    with broken([(PlateauDetector, "update")], here):
        trainer = lightning_on_ranks.make_trainer(folder, world_size, callbacks, max_steps=16)
        trainer.fit(lightning_on_ranks.Module(), lightning_on_ranks.loader(64 * world_size))
    return trainer.global_step


def on_rank(rank: int, world_size: int, folder: str, failing_rank: int) -> dict[str, Any]:
    as_if_launched(rank, world_size)
    here = rank == failing_rank

    folders = (f"{folder}/{i}" for i in itertools.count())

    def trainer(callbacks: list[Any]) -> tuple[int, float]:
        return by_trainer(next(folders), callbacks)

    def lightning(callbacks: list[Any]) -> tuple[int, float]:
        return by_lightning(next(folders), world_size, callbacks)

    with mock.patch.object(trainer_entropy, "takes_pictures", return_value=True):
        of_trainer = over_places(
            {**ENTROPY, **OF_TRAINER}, here, lambda given: trainer([MatrixEntropyCallback(1, **given)])
        )
    with mock.patch.object(lightning_entropy, "takes_pictures", return_value=True):
        of_lightning = over_places(
            {**ENTROPY, **OF_LIGHTNING}, here, lambda given: lightning([LightningCallback(1, **given)])
        )
    return {
        "Trainer": {
            "alone": trainer([]),
            "places": of_trainer,
            "alignment": alignment_fails(here, trainer, AlignmentCallback),
        },
        "Lightning": {
            "alone": lightning([]),
            "places": of_lightning,
            "alignment": alignment_fails(here, lightning, LightningAlignment),
            "stopped": lightning_stops(folder, here, world_size),
        },
    }
