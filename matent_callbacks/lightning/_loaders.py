"""Finds the data loaders of a run and of an evaluation, by the Trainer's internals."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from matent_callbacks.alignment.first_pairs import leaves
from matent_callbacks.capture.randomness import same_random_numbers


def num_evaluated(trainer: Any) -> int:
    """Return how many loaders the evaluation that is under way has."""
    return len(leaves(trainer._evaluation_loop._combined_loader))


def evaluated_loader(trainer: Any, index: int) -> Any:
    """Return one of the loaders of the evaluation that is under way."""
    return leaves(trainer._evaluation_loop._combined_loader)[index]


def loader_of_run(trainer: Any) -> Any:
    """Return the first loader of validation, or of training where the run has no validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders: Any = None
    if trainer.enable_validation:
        source = loop._data_source
        loaders = _loaded(trainer, loop) if source.is_module() else source.instance
    found = leaves(loaders) or leaves(trainer.fit_loop._combined_loader)
    return found[0] if found else None


def _loaded(trainer: Any, loop: Any) -> Any:
    """Return the loaders of the module's or data module's own hook, which is called no earlier than it has to be."""
    if loop._combined_loader is not None:
        return loop._combined_loader
    # As Lightning itself does when training begins, if there is a validation in the first epoch.
    reloaded, trainer.validating = loop._last_val_dl_reload_epoch, True
    try:
        with same_random_numbers():
            before = _next_numbers()
            loop.setup_data()
            drawn = trainer.strategy.reduce_boolean_decision(_next_numbers() != before, all=False)
    finally:
        trainer.training = True
    combined = loop._combined_loader
    if drawn:
        # Where the hook draws random numbers, the run is the same only if it is called again when it is due; on all
        # ranks alike, since they wait for each other there.
        loop._combined_loader, loop._max_batches, loop._last_val_dl_reload_epoch = None, [], reloaded
    return combined


def _next_numbers() -> tuple[float, ...]:
    """Return what would be drawn next of each kind of random numbers."""
    numpy = sys.modules.get("numpy")
    with same_random_numbers():
        of_numpy = 0.0 if numpy is None else float(numpy.random.random())
        return random.random(), of_numpy, torch.rand(()).item()
