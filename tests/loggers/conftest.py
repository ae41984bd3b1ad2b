"""A logger of each library, and a look-out for any that would go to the network."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matent_callbacks.callbacks.layer_pictures import LayerPictures
from tests.conftest import collate, text_examples
from tests.loggers.libraries import Library


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tried: list[Any] = []

    def refuse_others(connect: Callable[..., Any]) -> Callable[..., Any]:
        def local_only(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                tried.append(address)
                raise OSError("no network in this test")
            return connect(self, address)

        return local_only

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse_others(getattr(socket.socket, name)))
    yield
    assert not tried


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Library]]:
    """Makes a library ready to write into a folder of its own; skips where it is not installed."""
    ready: list[Library] = []

    def make(kind: type[Library]) -> Library:
        pytest.importorskip(kind.package)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        library = kind(folder)
        ready.append(library)
        library.prepare(monkeypatch)
        return library

    yield make
    for library in ready:
        library.finish()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """The pictures that were drawn, in their order."""
    everything: list[dict[str, np.ndarray]] = []
    draw = LayerPictures.draw

    def remember(self: LayerPictures, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        pictures = draw(self, *args, **kwargs)
        everything.extend([pictures] if pictures else [])
        return pictures

    monkeypatch.setattr(LayerPictures, "draw", remember)
    return everything


@pytest.fixture
def fit(make_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Eight steps of a small Llama; what its weights are then."""

    def train(package: str, loggers: list[Any], callbacks: list[Any]) -> dict[str, torch.Tensor]:
        pl = importlib.import_module(package)

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = make_llama()

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                return self.model(**batch).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        module = Module()
        trainer = pl.Trainer(
            max_steps=8,
            logger=loggers,
            callbacks=callbacks,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(text_examples(32), batch_size=4, collate_fn=collate))
        return module.state_dict()

    return train
