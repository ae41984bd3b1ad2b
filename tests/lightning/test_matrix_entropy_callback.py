"""The Lightning callback on real Lightning runs, from either package."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from matent_callbacks.lightning import MatrixEntropyCallback
from tests.conftest import collate, slow_pooled_entropy, text_examples
from tests.versions import BOTH_PACKAGES
from tests.wandb_history import read_history

KEY = "matrix_entropy/last"


def loader(count: int, *, start: int = 0, length: int = 24) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(text_examples(count, length, start=start), batch_size=4, collate_fn=collate)


@pytest.fixture
def make_module(make_llama: Callable[..., Any]) -> Callable[..., Any]:
    """A LightningModule around a Llama; it remembers the hidden states of each training forward on request."""

    def make(
        package: str = "lightning.pytorch", *, spy: bool = False, wrap: Any = None, logs: bool = True, **arguments: Any
    ) -> Any:
        pl = importlib.import_module(package)

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                model = make_llama(**arguments)
                self.model = wrap(model) if wrap else model
                self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
                self.losses: list[float] = []

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                output = self.model(**batch, output_hidden_states=spy)
                if spy:
                    self.seen.append((output.hidden_states[-1].detach().clone(), batch["attention_mask"]))
                if logs:
                    self.losses.append(output.loss.item())
                    self.log("train_loss", output.loss)
                return output.loss

            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
                self.log("val_loss", self.model(**batch).loss)

            test_step = validation_step

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        return Module()

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    def make(package: str = "lightning.pytorch", **arguments: Any) -> Any:
        pl = importlib.import_module(package)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        if arguments.get("barebones"):
            quiet = {"accelerator": "cpu"}
        else:
            quiet.setdefault("enable_checkpointing", arguments.get("enable_checkpointing", False))
        return pl.Trainer(**{**quiet, "default_root_dir": tmp_path, **arguments})

    return make


def pooled(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    rows = [(h[i], m[i]) for h, m in seen for i in range(len(h))]
    longest = max(len(h) for h, _ in rows)
    hidden = torch.stack([nn.functional.pad(h, (0, 0, 0, longest - len(h))) for h, _ in rows])
    return slow_pooled_entropy(hidden, torch.stack([nn.functional.pad(m, (0, longest - len(m))) for _, m in rows]))


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_in_the_background_the_values_stand_under_their_steps_and_training_is_the_same(
    make_module, make_trainer, tmp_path
):
    from lightning.pytorch import loggers

    def run(background: bool) -> tuple[list[dict[str, str]], list[float]]:
        folder = tmp_path / f"csv{background}"
        callback = MatrixEntropyCallback(2, layers="all", background=background)
        module = make_module()
        trainer = make_trainer(max_steps=7, logger=loggers.CSVLogger(folder), callbacks=[callback], log_every_n_steps=1)
        torch.manual_seed(0)
        trainer.fit(module, loader(40))
        assert f"{KEY}" in trainer.callback_metrics
        return csv_rows(folder), module.losses

    (later, later_losses), (at_once, losses) = run(True), run(False)
    assert later_losses == losses
    for key in (KEY, "effective_rank/layer_00"):
        read = {row["step"]: row[key] for row in at_once if row.get(key)}
        assert sorted(map(int, read)) == [1, 3, 5]
        assert {row["step"]: row[key] for row in later if row.get(key)} == read


def test_two_pictures_hold_all_layers_also_after_resuming(make_module, make_trainer, tmp_path, own_wandb):
    import wandb
    from lightning.pytorch import loggers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fit(max_steps: int, path: Any = None) -> Any:
        callback = MatrixEntropyCallback(1, layers="all")
        trainer = make_trainer(
            max_steps=max_steps,
            logger=[
                loggers.CSVLogger(tmp_path / "csv"),
                loggers.TensorBoardLogger(tmp_path / "tb", version=0),
                loggers.WandbLogger(save_dir=tmp_path / "wb", offline=True),
            ],
            callbacks=[callback],
        )
        trainer.fit(make_module(), loader(40), ckpt_path=path)
        return trainer, callback

    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    wandb.finish()
    assert len(list((tmp_path / "wb").rglob("*profile*.png"))) == 2
    _, callback = fit(6, tmp_path / "saved.ckpt")
    wandb.finish()
    assert [record["step"] for record in callback._run.records] == [0, 1, 2, 3, 4, 5]
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events*")).parent), {"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["layers/effective_rank_profile", "layers/effective_rank_heatmap"]


@BOTH_PACKAGES
def test_loggers_hold_the_values_at_the_right_steps(package, make_module, make_trainer, tmp_path, own_wandb):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = importlib.import_module(f"{package}.loggers")
    module = make_module(package, spy=True)
    trainer = make_trainer(
        package,
        max_steps=8,
        val_check_interval=4,
        num_sanity_val_steps=2,
        log_every_n_steps=3,
        logger=[
            loggers.CSVLogger(tmp_path / "csv"),
            loggers.TensorBoardLogger(tmp_path / "tb"),
            loggers.WandbLogger(save_dir=tmp_path / "wb", offline=True),
        ],
        callbacks=[MatrixEntropyCallback(2)],
    )
    trainer.fit(module, loader(40), loader(8, start=100))
    wandb.finish()
    # Lightning's own x axis counts from 0: the reading of optimizer step k stands with the loss of step k, at k - 1.
    expected = {k - 1: pytest.approx(pooled(module.seen[k - 1 : k]), rel=1e-5) for k in (2, 4, 6, 8)}

    rows = csv_rows(tmp_path / "csv")
    assert {int(r["step"]): float(r[KEY]) for r in rows if r.get(KEY)} == expected
    validated = [r for r in rows if r.get(f"val_{KEY}")]
    assert len(validated) == 2
    assert all(r["val_loss"] for r in validated)

    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events*")).parent))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars(KEY)} == expected
    assert len(events.Scalars(f"val_{KEY}")) == 2

    history = read_history(tmp_path / "wb")
    assert {r["trainer/global_step"]: r[KEY] for r in history if KEY in r} == expected


@BOTH_PACKAGES
def test_checkpoint_and_early_stopping_monitor_the_values(package, make_module, make_trainer, tmp_path):
    callbacks = importlib.import_module(f"{package}.callbacks")
    checkpoint = callbacks.ModelCheckpoint(tmp_path / "best", monitor="val_effective_rank/last", mode="min")
    stopping = callbacks.EarlyStopping("val_effective_rank/last", mode="min", min_delta=1e6, patience=1)
    trainer = make_trainer(
        package,
        max_epochs=10,
        enable_checkpointing=True,
        limit_train_batches=2,
        callbacks=[stopping, checkpoint, MatrixEntropyCallback(2)],
    )
    trainer.fit(make_module(package), loader(40), loader(8, start=100))
    assert trainer.current_epoch == 2  # nothing improves by 1e6
    assert checkpoint.best_model_score is not None
    assert {KEY, f"val_{KEY}", "effective_rank/last"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("with_probe", [False, True])
def test_training_is_bitwise_the_same(make_module, make_trainer, with_probe):
    def run(callbacks: list[Any]) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
        module = make_module()
        torch.manual_seed(1)
        make_trainer(max_steps=12, val_check_interval=4, callbacks=callbacks).fit(module, loader(64), loader(8))
        return module.losses, module.state_dict(), torch.get_rng_state()

    probe = collate(text_examples(4, start=200)) if with_probe else None
    reference = "start" if with_probe else None
    losses, weights, rng = run([])
    losses_with, weights_with, rng_with = run([MatrixEntropyCallback(2, "all", probe=probe, reference=reference)])
    assert len(losses) == 12
    assert losses == losses_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert torch.equal(rng, rng_with)


def test_several_validation_loaders_and_prefixes(make_module, make_trainer):
    module = make_module()
    trainer = make_trainer(max_steps=2, callbacks=[MatrixEntropyCallback(100)])
    trainer.validate(module, [loader(8, length=12), loader(8, length=30)], verbose=False)
    short, long = (trainer.callback_metrics[f"val_{KEY}/dataloader_idx_{i}"].item() for i in (0, 1))
    trainer.validate(module, loader(8, length=12), verbose=False)
    assert trainer.callback_metrics[f"val_{KEY}"].item() == pytest.approx(short)
    trainer.test(module, loader(8, length=30), verbose=False)
    assert trainer.callback_metrics[f"test_{KEY}"].item() == pytest.approx(long)
    assert short != pytest.approx(long)


def test_validation_values_and_ignored_sanity_check(make_module, make_trainer, make_llama):
    module = make_module()
    hidden, masks = [], []
    for batch in loader(8, start=100):
        with torch.no_grad():
            output = module.model.eval()(**batch, output_hidden_states=True)
        hidden.append(output.hidden_states[-1])
        masks.append(batch["attention_mask"])
    module.train()
    trainer = make_trainer(max_steps=1, num_sanity_val_steps=-1, callbacks=[MatrixEntropyCallback(1)])
    seen: list[set[str]] = []
    module.on_train_start = lambda: seen.append(set(trainer.callback_metrics))
    trainer.validate(module, loader(8, start=100), verbose=False)
    expected = pooled(list(zip(hidden, masks, strict=True)))
    assert trainer.callback_metrics[f"val_{KEY}"].item() == pytest.approx(expected, rel=1e-5)
    trainer = make_trainer(max_steps=1, num_sanity_val_steps=-1, callbacks=[MatrixEntropyCallback(1)])
    trainer.fit(module, loader(8), loader(8, start=100))
    assert not any(key.startswith("val_matrix") for key in seen[0])


def test_fast_dev_run_and_barebones(make_module, make_trainer):
    trainer = make_trainer(fast_dev_run=True, callbacks=[MatrixEntropyCallback(1)])
    trainer.fit(make_module(), loader(8), loader(8))
    assert {KEY, f"val_{KEY}"} <= set(trainer.callback_metrics)
    trainer = make_trainer(barebones=True, max_steps=2, callbacks=[MatrixEntropyCallback(1)])
    with pytest.warns(UserWarning, match=r"barebones=True\) logs nothing, so no readings are taken"):
        trainer.fit(make_module(), loader(8), loader(8))
    assert trainer.global_step == 2


def test_two_instances_side_by_side_have_their_own_state(make_module, make_trainer, tmp_path):
    probe = collate(text_examples(4, start=200))
    callbacks = [
        MatrixEntropyCallback(2, "last", probe=probe, reference="start"),
        MatrixEntropyCallback(2, [1], probe=probe, reference="start"),
    ]
    trainer = make_trainer(max_steps=2, callbacks=callbacks)
    trainer.fit(make_module(), loader(16))
    assert {"diff_erank/last", "diff_erank/layer_01"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    ours = [state for key, state in states.items() if key.startswith("MatrixEntropyCallback")]
    assert [list(state["reference_ranks"]) for state in ours] == [
        ["sequence_effective_rank/last"],
        ["sequence_effective_rank/layer_01"],
    ]


def test_the_probe_runs_in_the_precision_of_the_training(make_module, make_trainer):
    probe = collate(text_examples(4, start=200))
    values = []
    for precision in ("bf16-mixed", "32-true"):
        trainer = make_trainer(max_steps=1, precision=precision, callbacks=[MatrixEntropyCallback(1, probe=probe)])
        torch.manual_seed(1)
        trainer.fit(make_module(dropout=0.0), loader(8))
        values.append(trainer.callback_metrics[KEY].item())
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_a_module_compiled_as_a_whole_needs_a_probe_and_says_so(make_module, make_trainer):
    probe = collate(text_examples(4, start=200))

    def run(module: Any, callback: MatrixEntropyCallback) -> dict[str, Any]:
        torch.manual_seed(1)
        trainer = make_trainer(max_steps=2, callbacks=[callback])
        trainer.fit(module, loader(16))
        return dict(trainer.callback_metrics)

    # Without `self.log`, which dynamo cannot trace in these versions.
    compiled = torch.compile(make_module(dropout=0.0, logs=False), backend="eager")
    values = run(compiled, MatrixEntropyCallback(2, probe=probe))
    expected = run(make_module(dropout=0.0), MatrixEntropyCallback(2, probe=probe))
    assert values[KEY].item() == pytest.approx(expected[KEY].item(), rel=1e-5)
    with pytest.warns(UserWarning, match="compiled as a whole, and hooks cannot fire inside: pass `probe`"):
        assert KEY not in run(torch.compile(make_module(logs=False), backend="eager"), MatrixEntropyCallback(1))
    torch._dynamo.reset()


def test_resumed_series_is_that_of_the_uninterrupted_run(make_module, make_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    probe = collate(text_examples(4, start=200))

    def run(folder: str, epochs: int, checkpoint: Path | None = None) -> tuple[dict[int, Any], Any]:
        callback = MatrixEntropyCallback(2, metrics=("drift", "token_cosine"), probe=probe, reference="start")
        trainer = make_trainer(max_epochs=epochs, logger=CSVLogger(tmp_path / folder), callbacks=[callback])
        trainer.fit(make_module(dropout=0.0), loader(16), ckpt_path=checkpoint)
        rows = csv_rows(tmp_path / folder)
        keys = ("diff_erank/last", "drift/last", "token_cosine/last")
        return {int(r["step"]): [float(r[key]) for key in keys] for r in rows if r.get(keys[0])}, trainer

    whole, _ = run("whole", 2)
    first, trainer = run("first", 1)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    second, _ = run("second", 2, tmp_path / "at4.ckpt")
    assert sorted(whole) == [1, 3, 5, 7]
    assert {**first, **second} == whole
    assert sorted(second) == [5, 7]


class Transformer(nn.Module):
    """Not of transformers: blocks of torch around images cut into patches, with its own way to be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.patches(x)).mean(1))


def test_own_transformer_is_found_and_masked_by_a_callable(make_trainer):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Transformer()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.last_input = batch
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    images = torch.randn(8, 9, 12, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(images, batch_size=4)

    def without_last(batch: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(batch.shape[:2])
        mask[:, -1] = 0
        return mask

    for mask, cut in ((None, 9), (without_last, 8)):
        module = Module()
        trainer = make_trainer(max_steps=1, callbacks=[MatrixEntropyCallback(1, "all", mask=mask)])
        trainer.fit(module, data)
        net = module.net
        hidden = net.patches(module.last_input)
        expected = [hidden]
        for layer in net.encoder.layers:
            expected.append(layer(expected[-1]))
        expected = [*expected[:-1], net.encoder.norm(expected[-1])]
        for name, value in zip(("layer_00", "layer_01", "last"), expected, strict=True):
            reading = trainer.callback_metrics[f"matrix_entropy/{name}"].item()
            assert reading == pytest.approx(slow_pooled_entropy(value.detach()[:, :cut]), rel=1e-5)


def test_unknown_layer_is_told_at_setup(make_module, make_trainer):
    trainer = make_trainer(max_steps=1, callbacks=[MatrixEntropyCallback(layers="model.model.layer.1")])
    with pytest.raises(ValueError, match=r"`layers` asks for 'model.model.layer.1'.*model.model.layers.1"):
        trainer.fit(make_module(), loader(8))


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_only_one_of_the_packages_is_needed(package):
    other = "pytorch_lightning" if package == "lightning.pytorch" else "lightning"
    code = (
        f"import sys; sys.modules[{other!r}] = None\n"
        "from matent_callbacks.lightning import MatrixEntropyCallback\n"
        f"import {package} as pl; assert issubclass(MatrixEntropyCallback, pl.Callback)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
