"""PlateauStopping on real Lightning runs, on simple modules that log a series."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import PlateauDetector
from matent_callbacks.lightning import PlateauStopping
from tests.versions import BOTH_PACKAGES

SCORES = [min(step, 12) / 2 for step in range(1, 80)]
LOADER = torch.utils.data.DataLoader(torch.zeros(200, 1), batch_size=2)


def make_module(
    package: str = "lightning.pytorch", *, where: str = "train", key: str = "score", values: list[float] = SCORES
) -> Any:
    """Logs ``values``, one a training batch, a training epoch or a validation."""
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("logged", torch.zeros((), dtype=torch.long))

        def score(self) -> None:
            if not self.trainer.sanity_checking:
                self.log(key, values[int(self.logged)])
                self.logged += 1

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if where == "train":
                self.score()
            return self.layer(batch).sum()

        def on_train_epoch_end(self) -> None:
            if where == "epoch":
                self.score()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_epoch_end(self) -> None:
            if where == "validation":
                self.score()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Module()


def make_trainer(folder: Path, callbacks: list[Any], package: str = "lightning.pytorch", **arguments: Any) -> Any:
    pl = importlib.import_module(package)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    quiet["enable_checkpointing"] = False
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **arguments})


def stopping() -> PlateauStopping:
    return PlateauStopping("score", min_delta=1.0, patience=4)


def expected_stop() -> int:
    detector = PlateauDetector(min_delta=1.0, patience=4)
    return next(step for step, value in enumerate(SCORES, start=1) if detector.update(step, value))


@BOTH_PACKAGES
@pytest.mark.parametrize(
    ("where", "steps_per_value", "arguments"),
    [
        ("train", 1, {}),
        ("epoch", 3, {"limit_train_batches": 3}),
        ("validation", 5, {"val_check_interval": 5, "num_sanity_val_steps": 2}),
    ],
)
def test_stops_at_the_plateau_and_says_why_once(package, where, steps_per_value, arguments, tmp_path, capsys):
    trainer = make_trainer(tmp_path, [stopping()], package, max_steps=1000, max_epochs=-1, **arguments)
    trainer.fit(make_module(package, where=where), LOADER, LOADER)
    # Callbacks come before the module at the end of an epoch, so what it logs there is seen after one more batch.
    stop = expected_stop() * steps_per_value + (where == "epoch")
    assert trainer.global_step == stop
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopping")]
    assert len(lines) == 1
    assert f"score: plateau at step {stop}, value 6" in lines[0]
    assert trainer.callback_metrics["plateau/score/since_progress"] >= 1
    assert "plateau/score" in trainer.callback_metrics


def test_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path):
    def fit(max_epochs: int, checkpoint: Path | None = None) -> Any:
        trainer = make_trainer(tmp_path, [stopping()], limit_train_batches=2, max_epochs=max_epochs)
        trainer.fit(make_module(where="validation"), LOADER, LOADER, ckpt_path=checkpoint)
        return trainer

    whole = fit(60)
    assert whole.global_step == 2 * expected_stop()
    fit(9).save_checkpoint(tmp_path / "at9.ckpt")
    assert fit(60, tmp_path / "at9.ckpt").global_step == whole.global_step


def test_loggers_hold_the_trend(tmp_path):
    import csv

    from lightning.pytorch.loggers import CSVLogger

    trainer = make_trainer(tmp_path, [stopping()], max_steps=10, logger=CSVLogger(tmp_path), log_every_n_steps=100)
    trainer.fit(make_module(), LOADER)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["plateau/score"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert all(float(row["plateau/score"]) == pytest.approx(2.0) for row in rows)


def test_a_name_that_is_never_logged_is_told_with_near_matches(tmp_path):
    trainer = make_trainer(tmp_path, [PlateauStopping("scores", min_delta=1.0, patience=2)], max_steps=1)
    with pytest.warns(UserWarning, match=r"`monitor` 'scores' was never logged.*Near: score"):
        trainer.fit(make_module(), LOADER)
