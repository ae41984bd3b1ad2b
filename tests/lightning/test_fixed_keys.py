"""The keys of Lightning's evaluations stay the same, whatever the hidden states hold."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from typing import Any

import pytest
import torch

from matent_callbacks.lightning import CollapseAlarm, MatrixEntropyCallback, PlateauStopping
from tests.lightning.test_matrix_entropy_callback import loader, make_module, make_trainer  # noqa: F401
from tests.versions import BOTH_PACKAGES

LAST = "val_effective_rank/last"


@BOTH_PACKAGES
@pytest.mark.parametrize("some", ["all", "first"])
def test_a_module_that_diverges_goes_on_with_its_monitored_key(package, some, make_module, make_trainer, tmp_path):  # noqa: F811
    callbacks = importlib.import_module(f"{package}.callbacks")
    module = make_module(package)
    keys: list[set[str]] = []

    class Spoil(callbacks.Callback):
        on = False

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.on = trainer.current_epoch > 0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.on = False

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            keys.append({key for key in trainer.callback_metrics if key.startswith("val_")})

    spoil = Spoil()

    def hook(norm: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not spoil.on:
            return None
        output = output.clone()
        output[:, slice(None) if some == "all" else 0] = math.nan
        return output

    module.model.model.norm.register_forward_hook(hook)
    trainer = make_trainer(
        package,
        max_epochs=4,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        limit_train_batches=2,
        callbacks=[
            spoil,
            callbacks.ModelCheckpoint(tmp_path / "best", monitor=LAST, mode="max"),
            callbacks.EarlyStopping(LAST, mode="max", patience=50, check_finite=False),
            PlateauStopping(LAST, min_delta=0.1, patience=5),
            CollapseAlarm(LAST),
            MatrixEntropyCallback(2),
        ],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(40), loader(8, start=100))
    assert trainer.current_epoch == 4
    assert len({frozenset(own) for own in keys}) == 1
    assert math.isnan(trainer.callback_metrics[LAST]) == (some == "all")
    told = [str(w.message) for w in caught if "NaN or Inf" in str(w.message)]
    if some == "all":
        assert len([t for t in told if re.search(r"all \d+ tokens are NaN or Inf in last", t)]) == 1
    else:
        assert told == ["Tokens with NaN or Inf were left out of the readings of an evaluation: last (8)."]
