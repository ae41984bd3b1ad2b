"""Parses logged names into quantity, layer and data set, whichever logger wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from matent_callbacks.accumulate.catalogue import METRICS, SPECTRUM_TOP

DRIFT = "drift"
# The spectrum is logged as several numbers, which have names of their own.
LAYER_METRICS = (*(name for name in METRICS if name != "spectrum"), "diff_erank")
# What Lightning users call their training loss; the first that was logged is taken.
LOSSES = ("loss", "train_loss", "train_loss_step", "training_loss", "train_loss_epoch")

_METRICS = "|".join((*LAYER_METRICS, "nonfinite_tokens", "alignment", "plateau", rf"{SPECTRUM_TOP}\d+"))
_LOADER = r"(?:/dataloader_idx_(?P<loader>\d+))?"
_KEY = re.compile(rf"(?P<held>eval_(?:(?P<set>.+?)_)??)?(?:loss|(?P<metric>{_METRICS})/(?P<place>.+?)){_LOADER}")
# The name of a callback, of a probe, or of both. Names that PlateauStopping and CollapseAlarm log contain other names.
_NAMED = re.compile(
    rf"(?P<held>eval_)?(?!(?:{_METRICS}|collapse)/)(?P<name>[^/]+(?:/[^/]+)?)/"
    rf"(?P<metric>{_METRICS})/(?P<place>.+?){_LOADER}"
)
_HELD_OUT = re.compile(r"(?:eval|val|valid|validation)[/_]")


class Quantity(NamedTuple):
    """What was measured, where in the model, and on which data."""

    metric: str
    place: str = ""
    held_out: str | None = None
    """``None``: the training data; otherwise the name of the held-out data, ``""`` where they have none."""
    name: str = ""
    """That of the callback or the probe, or of both with a slash between, that it was logged under."""


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
    match = _NAMED.fullmatch(key) or _KEY.fullmatch(key)
    if match is None:
        return None
    found = match.groupdict("")
    held_out = None
    if found["held"]:
        held_out = f"loader {found['loader']}" if found["loader"] else found.get("set", "")
    return Quantity(found["metric"] or "loss", found["place"], held_out, found.get("name", ""))


def parse_all(keys: Iterable[str]) -> dict[Quantity, str]:
    """Parse all normalised names that the report knows, with prefixes that are ambiguous in one name alone.

    If anything logs as ``english/...``, then ``test_english/...`` is on its test data, and ``eval_wiki_english/...`` on
    its held-out data ``wiki``.
    """
    found = {key: quantity for key in sorted(keys) if (quantity := parse(key)) is not None}
    names = {quantity.name for quantity in found.values() if quantity.held_out is None} - {""}
    return {_without_data_set(quantity, names): key for key, quantity in found.items()}


def _without_data_set(quantity: Quantity, names: Iterable[str]) -> Quantity:
    if quantity.held_out is not None and quantity.name in names:
        return quantity
    for name in names:
        data = quantity.name.removesuffix(f"_{name}")
        if data != quantity.name and (data == "test" or quantity.held_out is not None):
            return quantity._replace(held_out=quantity.held_out or data, name=name)
    return quantity
