"""Parses logged names into quantity, layer and data set, whichever logger wrote them."""

from __future__ import annotations

import re
from typing import NamedTuple

from matent_callbacks.accumulate.catalogue import CATALOGUE, SPECTRUM_TOP

# The spectrum is logged as several numbers, which have names of their own.
LAYER_METRICS = (*(name for name in CATALOGUE if name != "spectrum"), "diff_erank")
# What Lightning users call their training loss; the first that was logged is taken.
LOSSES = ("loss", "train_loss", "train_loss_step", "training_loss", "train_loss_epoch")

_METRICS = "|".join((*LAYER_METRICS, "nonfinite_tokens", "alignment", "plateau", rf"{SPECTRUM_TOP}\d+"))
_KEY = re.compile(
    rf"(?P<held>eval_(?:(?P<set>.+?)_)??)?(?:loss|(?P<metric>{_METRICS})/(?P<place>.+?))(?:/dataloader_idx_(?P<loader>\d+))?"
)
_HELD_OUT = re.compile(r"(?:eval|val|valid|validation)[/_]")


class Quantity(NamedTuple):
    """What was measured, where in the model, and on which data."""

    metric: str
    place: str = ""
    held_out: str | None = None
    """``None``: the training data; otherwise the name of the held-out data, ``""`` where they have none."""


def normalise(key: str) -> str | None:
    """Map a logged name to the Hugging Face Trainer's own; ``None`` for its averages over a whole run."""
    if key == "train/train_loss":
        return None
    return (
        _HELD_OUT.sub("eval_", key.removeprefix("train/"), count=1)
        if _HELD_OUT.match(key)
        else key.removeprefix("train/")
    )


def parse(key: str) -> Quantity | None:
    """Parse a normalised name; ``None`` for one that the report does not know."""
    if key in LOSSES:
        return Quantity("loss")
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    held_out = None
    if match["held"]:
        held_out = f"loader {match['loader']}" if match["loader"] else match["set"] or ""
    return Quantity(match["metric"] or "loss", match["place"] or "", held_out)
