"""Ours / the RankMe callback of `stable-pretraining`, on the same embeddings.

Both in Lightning, one optimizer step over so many batches: theirs keeps the embeddings of all of them in a queue and
takes the singular values of the queue in the validation that follows, ours (`metrics="rankme"`) accumulates their
covariance. *Extra* is what a `fit` takes beyond one with neither callback. Theirs adds 1e-5 to each share before the
logarithm, which moves its value.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import re
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks._report import begin, conditions, table
from benchmarks._timing import interleaved, mebibytes, peak_bytes
from matent_callbacks.lightning import MatrixEntropyCallback

BATCH = 1024  # embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs")
    quick = parser.parse_args().quick
    begin("Ours / RankMe of stable-pretraining", __doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    shapes = [(64, 2)] if quick else [(256, 4), (256, 16), (768, 4), (768, 16)]  # width, batches
    rows = [compare(width, count, rounds=2 if quick else 5) for width, count in shapes]
    header = ["d", "embeddings", "extra time", "extra memory | ours | theirs", "value, ours | theirs | met"]
    table(header, rows)
    print(conditions("lightning", "stable-pretraining") + "\n")


class Embeddings(pl.LightningModule):
    """Hands on embeddings whose spectrum falls as a power law, as those of trained models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(width, width)
        self.callbacks_modules = nn.ModuleDict()  # where stable-pretraining keeps its queues
        with torch.no_grad():
            self.encoder.weight.mul_(torch.arange(1, width + 1).pow(-0.5).unsqueeze(1))

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        embedding = self.encoder(batch["x"])
        return {"loss": embedding.square().mean(), "embedding": embedding.detach()}

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), lr=0.0)


def compare(width: int, count: int, *, rounds: int) -> list[str]:
    torch.manual_seed(1)
    data = [{"x": torch.randn(BATCH, width)} for _ in range(count)]
    values: dict[str, float] = {}
    fits = {name: functools.partial(fit, name, data, width, values) for name in ("neither", "ours", "theirs")}
    seconds = interleaved(fits, rounds=rounds)
    peaks = {name: peak_bytes(way) for name, way in fits.items()}
    extra = {
        name: statistics.median(own - bare for own, bare in zip(seconds[name], seconds["neither"], strict=True))
        for name in ("ours", "theirs")
    }
    memory = {name: peaks[name] - peaks["neither"] for name in ("ours", "theirs")}
    time = extra["ours"] / extra["theirs"]
    return [
        str(width),
        str(count * BATCH),
        f"{time:.3f}",
        f"{memory['ours'] / memory['theirs']:.3f}",
        mebibytes(memory["ours"]),
        mebibytes(memory["theirs"]),
        f"{values['ours']:.2f}",
        f"{values['theirs']:.2f}",
        "yes" if max(time, memory["ours"] / memory["theirs"]) <= 1 else "**no**",
    ]


def fit(name: str, data: list[dict[str, Tensor]], width: int, values: dict[str, float]) -> None:
    """One optimizer step over all batches, then one batch of validation."""
    callbacks: list[Any] = []
    if name == "ours":
        callbacks = [MatrixEntropyCallback(1, "encoder", metrics="rankme", during_eval=False, on_error="raise")]
    elif name == "theirs":
        callbacks = [rankme_class()("theirs", "embedding", len(data) * BATCH, width)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            max_epochs=1,
            accumulate_grad_batches=len(data),
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Embeddings(width), loader(data), loader(data[:1]))
    values.update({name: float(v) for key, v in trainer.callback_metrics.items() if "rankme" in key or key == "theirs"})


def loader(data: list[dict[str, Tensor]]) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]


@functools.cache
def rankme_class() -> Any:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _declare_operators()
    from stable_pretraining.callbacks.rankme import RankMe

    return RankMe


def _declare_operators() -> None:
    # torchvision's compiled part does not load beside every build of torch, and without it its import fails for want
    # of operators that RankMe does not use.
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")  # noqa: TOR901
    _KEPT.append(library)
    for operator in re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', source):
        library.define(f"{operator}(Tensor x) -> Tensor")


_KEPT: list[Any] = []
"""A library's operators are gone with it."""


if __name__ == "__main__":
    main()
