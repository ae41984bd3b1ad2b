"""Real runs, trained once: a LLaVA under the Trainer and a Llama under Lightning, each with several loggers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import VOCABULARY, collate, text_examples
from tests.pairs import collate_pairs, llava_examples, make_llava
from tests.report.browser import POLICY
from tests.versions import require

HOSTILE = "<img src=x onerror=alert(1)>"


class Logged(NamedTuple):
    """One run under the loggers that wrote it down, and what the Trainer itself had in memory."""

    folder: Path
    tensorboard: Path
    wandb: Path
    history: list[dict[str, Any]]


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A LLaVA that PlateauStopping ends within 40 steps, with a hostile name."""
    require("transformers", "5.0")
    import wandb
    from transformers import Trainer, TrainingArguments

    from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback, PlateauStopping

    folder = tmp_path_factory.mktemp("llava") / HOSTILE
    examples = llava_examples(32)
    trainer = Trainer(
        model=make_llava(),
        args=TrainingArguments(
            output_dir=str(folder),
            run_name=HOSTILE,
            max_steps=40,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=4,
            save_steps=6,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            report_to=["tensorboard", "wandb"],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            remove_unused_columns=False,
        ),
        train_dataset=examples,
        eval_dataset=examples[:8],
        data_collator=collate_pairs,
        callbacks=[
            MatrixEntropyCallback(1, layers="all", metrics=("matrix_entropy", "effective_rank", "spectrum")),
            AlignmentCallback(2, num_pairs=8),
            PlateauStopping("loss", min_delta=1e9, patience=6, mode="any", verbose=False),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        # A W&B session of this run's own, as in `own_wandb`.
        wandb.teardown()
        patch.setenv("WANDB_DIR", str(folder.parent))
        trainer.train()
        wandb.finish()
        wandb.teardown()
    trainer.save_state()
    (run,) = folder.parent.glob("wandb/offline-run-*")
    return Logged(folder, folder / "runs", run, trainer.state.log_history)


def lightning_module() -> Any:
    import lightning.pytorch as pl
    from transformers import LlamaConfig, LlamaForCausalLM

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                )
            )

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lightning's folder of a run to step 20 that was resumed from the checkpoint at step 12 and went to step 24."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from matent_callbacks.lightning import MatrixEntropyCallback

    folder = tmp_path_factory.mktemp("lightning")
    data = [text_examples(96), text_examples(8, start=96)]
    loaders = [torch.utils.data.DataLoader(d, batch_size=4, collate_fn=collate) for d in data]

    def fit(steps: int, checkpoint: Path | None) -> None:
        trainer = pl.Trainer(
            logger=[CSVLogger(folder / "csv"), TensorBoardLogger(folder / "tensorboard")],
            callbacks=[
                MatrixEntropyCallback(2, layers="all"),
                ModelCheckpoint(folder, filename="{step}", every_n_train_steps=12, save_top_k=-1),
            ],
            max_steps=steps,
            log_every_n_steps=1,
            val_check_interval=6,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(lightning_module(), *loaders, ckpt_path=checkpoint)

    fit(20, None)
    fit(24, folder / "step=12.ckpt")
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        reason = "needs playwright and a chromium on the PATH"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page from disk; afterwards there must have been no dialog, no error, no request."""
    contexts, troubles = [], list[str]()

    def open_page(html: str, *, width: int = 1440, scheme: str = "light", policy: bool = True) -> Any:
        file = tmp_path / "report.html"
        assert html.count(POLICY) == 1
        file.write_text(html if policy else html.replace(POLICY, ""), encoding="utf-8")
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda r: r.url.startswith("data:") or r.url == file.as_uri() or troubles.append(r.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
