"""Of many layers, W&B draws charts only of the first, the middle and the last one; it has the values of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from matent_callbacks import LoopMonitor
from matent_callbacks.lightning import MatrixEntropyCallback as LightningCallback
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, llama, text_examples
from tests.wandb_history import read_charts, read_history

# A name of the user's own ends as ours do.
OWN = "grad_norm/layer_01"


class OwnName(LightningCallback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        pl_module.log(OWN, 1.0, on_step=True)


def train_with_transformers(make_trainer: Any, layers: int, **arguments: Any) -> None:
    callback = MatrixEntropyCallback(2, layers="all", pictures=False, **arguments)
    settings = {"report_to": ["wandb"], "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = make_trainer([callback], model=llama(layers=layers), **settings)
    trainer.train()
    trainer.log({OWN: 1.0})


def train_with_lightning(folder: Path, layers: int, **arguments: Any) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import WandbLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(layers=layers)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(text_examples(16), batch_size=4, collate_fn=collate)
    trainer = pl.Trainer(
        max_steps=4,
        val_check_interval=2,
        log_every_n_steps=1,
        logger=WandbLogger(save_dir=folder, offline=True),
        callbacks=[OwnName(2, layers="all", pictures=False, **arguments)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), loader, loader)


def train_in_a_loop(log: Any, layers: int, **arguments: Any) -> None:
    model = llama(layers=layers)
    with LoopMonitor(model, 2, "all", log=log, pictures=False, on_error="raise", **arguments) as monitor:
        for step in range(1, 5):
            with monitor.step(step):
                model(**collate(text_examples(3)))
            if step % 2 == 0:
                with monitor.evaluation(), torch.no_grad():
                    model(**collate(text_examples(3)))
            log.log({OWN: 1.0}, step=step)


def train_with_accelerate(folder: Path, layers: int, **arguments: Any) -> None:
    accelerator = Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("run", init_kwargs={"wandb": {"mode": "offline", "dir": str(folder)}})
    train_in_a_loop(accelerator, layers, **arguments)
    accelerator.end_training()


FRAMEWORKS = ["transformers", "lightning", "loop", "accelerate"]
STEPS = {"transformers": "train/global_step", "lightning": "trainer/global_step"}


@pytest.fixture(params=FRAMEWORKS)
def train(request: Any, own_wandb: Path, make_trainer: Any) -> Iterator[Any]:
    import wandb

    def run(layers: int, **arguments: Any) -> tuple[set[str], set[str]]:
        """The names that are logged, and those whose charts are hidden."""
        if request.param == "transformers":
            train_with_transformers(make_trainer, layers, **arguments)
        elif request.param == "lightning":
            train_with_lightning(own_wandb, layers, **arguments)
        elif request.param == "accelerate":
            train_with_accelerate(own_wandb, layers, **arguments)
        else:
            with wandb.init(mode="offline") as log:
                train_in_a_loop(log, layers, **arguments)
        wandb.finish()
        charts = read_charts(own_wandb)
        hidden = {name for name, (is_hidden, _) in charts.items() if is_hidden}
        assert {charts[name][1] for name in hidden} <= {STEPS.get(request.param, "")}
        return {key for row in read_history(own_wandb) for key in row if "/layer" in key or "/last" in key}, hidden

    return run


def test_charts_between_first_middle_and_last_are_hidden(train):
    logged, hidden = train(8)
    layers = [f"layer_{index:02}" for index in range(8)] + ["last"]
    ours = {key for key in logged if not key.endswith(OWN)}
    assert len(ours) == 2 * 2 * len(layers)
    assert {key for key in ours if not key.endswith(("/layer_00", "/layer_04", "/last"))} == hidden


@pytest.mark.parametrize(("layers", "arguments"), [(5, {}), (8, {"charts": "all"})])
def test_none_are_hidden_of_few_layers_or_if_all_are_asked_for(train, layers, arguments):
    logged, hidden = train(layers, **arguments)
    assert len(logged) > 4 * layers
    assert not hidden


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="`charts` must be 'few' or 'all', got 'some'"):
        MatrixEntropyCallback(charts="some")
