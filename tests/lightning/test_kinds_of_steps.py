"""LightningModules that draw or change their batches, and ones that make their optimizer steps themselves."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from matent_callbacks.lightning import MatrixEntropyCallback
from tests.conftest import collate, llama, slow_pooled_entropy, text_examples

KEY = "matrix_entropy/last"
BATCHES = 9


def loader(count: int, *, start: int = 0) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(text_examples(count, start=start), batch_size=4, collate_fn=collate)


class Module(pl.LightningModule):
    """A Llama; it keeps the hidden states and the mask of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        self.seen: list[list[tuple[Tensor, Tensor]]] = []
        self.losses: list[float] = []

    def run(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.model(**batch, output_hidden_states=True)
        self.seen[-1].append((output.hidden_states[-1].detach().clone(), batch["attention_mask"]))
        self.losses.append(output.loss.item())
        return output.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def entropy_of(forwards: list[tuple[Tensor, Tensor]]) -> float:
    rows = [(h[i][m[i].bool()]) for h, m in forwards for i in range(len(h))]
    longest = max(map(len, rows))
    hidden = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows])
    return slow_pooled_entropy(hidden, mask)


def fit(module: Module, folder: Path, callbacks: list[Any], **arguments: Any) -> tuple[pl.Trainer, dict[int, float]]:
    """The Trainer, and the readings by index of the batch."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **arguments},
    )
    torch.manual_seed(1)
    trainer.fit(module, loader(4 * BATCHES), loader(8, start=100))
    path = folder / "metrics.csv"
    if not path.exists():
        return trainer, {}
    with path.open() as file:
        return trainer, {int(row["step"]): float(row[KEY]) for row in csv.DictReader(file) if row.get(KEY)}


class Drawing(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        self.seen.append([])
        return self.run(batch)

    def validation_step(self, dataloader_iter: Any) -> None:
        batch, _, _ = next(dataloader_iter)
        self.seen.append([])
        self.run(batch)


def test_a_step_that_draws_its_batches_is_read_with_the_mask_of_its_own_batch(tmp_path):
    module, alone = Drawing(), Drawing()
    trainer, read = fit(module, tmp_path / "watched", [MatrixEntropyCallback(2)])
    fit(alone, tmp_path / "alone", [])
    assert module.losses == alone.losses
    assert read == {i: pytest.approx(entropy_of(module.seen[i]), rel=1e-5) for i in (1, 3, 5, 7)}
    validated = [forward for forwards in module.seen[BATCHES:] for forward in forwards]
    assert len(validated) == 2
    assert trainer.callback_metrics[f"val_{KEY}"].item() == pytest.approx(entropy_of(validated), rel=1e-5)


@pytest.mark.filterwarnings("default:Monitoring failed")
def test_a_mask_cannot_be_made_of_a_batch_that_the_step_draws(tmp_path):
    module = Drawing()
    with pytest.warns(UserWarning, match="`mask` is made from the batch, and a step that takes `dataloader_iter`"):
        _, read = fit(module, tmp_path, [MatrixEntropyCallback(2, mask=lambda batch: batch["attention_mask"])])
    assert all(map(math.isnan, read.values()))
    assert len(module.losses) == BATCHES + 2


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.flip(0) for name, tensor in batch.items()}


def hidden(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["attention_mask"].clone()
    mask[:, 1] = 0
    return {**batch, "attention_mask": mask}


def cropped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:, :9] for name, tensor in batch.items()}


def unmasked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


@pytest.mark.parametrize("changed", [flipped, hidden, cropped, unmasked])
def test_the_mask_of_the_batch_is_used_only_where_the_model_is_given_none(changed, tmp_path):
    class Changes(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            given = changed(batch)
            output = self.model(**given, output_hidden_states=True)
            mask = given.get("attention_mask", batch["attention_mask"])
            self.seen.append([(output.hidden_states[-1].detach().clone(), mask)])
            return output.loss

        validation_step = training_step

    module = Changes()
    trainer, read = fit(module, tmp_path, [MatrixEntropyCallback(2, on_error="raise")])
    assert read == {i: pytest.approx(entropy_of(module.seen[i]), rel=1e-5) for i in (1, 3, 5, 7)}
    validated = [forward for forwards in module.seen[BATCHES:] for forward in forwards]
    assert trainer.callback_metrics[f"val_{KEY}"].item() == pytest.approx(entropy_of(validated), rel=1e-5)


class Manual(Module):
    """As adversarial training: several optimizers, of which each batch makes as many steps as it is told."""

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen.append([])
        optimizers = self.optimizers()
        self.run(batch)  # of no optimizer
        for i in range(self.steps[batch_idx]):
            optimizer = optimizers[i % 2]
            optimizer.zero_grad()
            self.manual_backward(self.run(batch))
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        blocks = self.model.model.layers
        return [torch.optim.SGD(block.parameters(), lr=1e-3) for block in blocks[:2]]


def spans_due(steps: Sequence[int], every: int) -> list[list[int]]:
    """Batches of each reading, by definition: those from the last optimizer steps on to the first that reach or pass a
    multiple."""
    spans, under_way, done = [], [], 0
    for index, made in enumerate(steps):
        under_way.append(index)
        if any(step % every == 0 for step in range(done + 1, done + made + 1)):
            spans.append(under_way)
        if made:
            under_way = []
        done += made
    return spans


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("steps", [[2] * BATCHES, [0, 0, 1] * 3, [3, 1, 2, 0, 3, 2, 1, 0, 3]], ids=str)
def test_under_manual_optimization_a_reading_covers_whole_batches(steps, every, tmp_path, recwarn):
    module, alone = Manual(steps), Manual(steps)
    _, read = fit(module, tmp_path / "watched", [MatrixEntropyCallback(every, during_eval=False)])
    fit(alone, tmp_path / "alone", [])
    assert module.losses == alone.losses
    assert read == {
        span[-1]: pytest.approx(entropy_of([f for i in span for f in module.seen[i]]), rel=1e-5)
        for span in spans_due(steps, every)
    }
    assert not [str(w.message) for w in recwarn if "No valid token" in str(w.message)]


def test_more_steps_in_a_batch_than_ever_before_are_read_at_the_next_batch(tmp_path, recwarn):
    # Nothing tells before batch 2 that it will pass step 5.
    steps = [1, 1, 4, 1, 1, 1, 1, 1, 1]
    module = Manual(steps)
    _, read = fit(module, tmp_path, [MatrixEntropyCallback(5, during_eval=False)])
    assert read == {i: pytest.approx(entropy_of(module.seen[i]), rel=1e-5) for i in (3, 6)}
    assert not [str(w.message) for w in recwarn if "No valid token" in str(w.message)]


def test_a_run_that_passes_max_steps_ends_with_the_reading_of_its_probe(tmp_path):
    module = Manual([2] * BATCHES)
    probe = collate(text_examples(4, start=200))
    trainer, read = fit(module, tmp_path, [MatrixEntropyCallback(100, probe=probe)], max_steps=5)
    assert trainer.global_step == 6
    assert sorted(read) == [2]


def test_a_module_that_skips_the_rest_of_an_epoch_is_left_without_hooks(tmp_path):
    class Skips(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append([])
            return self.run(batch)

        def on_train_end(self) -> None:
            self.hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules())

    module, alone = Skips(), Skips()
    _, read = fit(module, tmp_path / "watched", [MatrixEntropyCallback(2, during_eval=False)])
    fit(alone, tmp_path / "alone", [])
    assert module.hooks == alone.hooks
    assert read == {i: pytest.approx(entropy_of(module.seen[i]), rel=1e-5) for i in [1]}
