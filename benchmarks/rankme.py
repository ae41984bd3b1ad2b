"""Ours / the RankMe callback of `stable-pretraining`, on the same embeddings.

Both in Lightning, one optimizer step over so many batches: theirs keeps the embeddings of all of them in a queue and
takes the singular values of the queue in the validation that follows, ours (`metrics="rankme"`) accumulates their
covariance. *Extra* is what a `fit` takes beyond one with neither callback. Theirs adds 1e-5 to each share before the
logarithm, which moves its value. The 14 further callbacks that it adds to every Trainer are left out everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import logging
import re
import statistics
import sys
import warnings
from importlib import metadata

import torch

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, mebibytes, peak_bytes

BATCH = 1024  # embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs")
    quick = parser.parse_args().quick
    begin("Ours / RankMe of stable-pretraining", __doc__)
    make_torchvision_importable()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    shapes = [(64, 2)] if quick else [(256, 4), (256, 16), (768, 4), (768, 16)]  # width, batches
    with contextlib.redirect_stdout(sys.stderr):
        rows = [compare(width, count, rounds=2 if quick else 5) for width, count in shapes]
    header = ["d", "embeddings", "extra time", "extra memory | ours | theirs", "value, ours | theirs | met"]
    table(header, rows)


def compare(width: int, count: int, *, rounds: int) -> list[str]:
    # Imported only now: Lightning itself imports torchvision if it is there.
    from benchmarks._embeddings import fit

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


def make_torchvision_importable() -> None:
    """Declare its operators if its compiled part does not load with this build of torch; RankMe uses none of them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        source = metadata.distribution("torchvision").locate_file("torchvision/_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', source):
            library.define(f"{operator}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []
"""Keeps the library alive: its operators would be gone with it."""


if __name__ == "__main__":
    main()
