"""Shows readings beside the progress bar of a Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

# Attribute of a bar: the values beside it, since several callbacks write beside one bar.
_SHOWN = "_matent_callbacks"


def show_in_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Put values behind the progress bar of training, beside those of other callbacks."""
    for callback in trainer.callback_handler.callbacks:
        bar: Any = getattr(callback, "training_bar", None)
        if hasattr(bar, "set_postfix"):
            shown = vars(bar).setdefault(_SHOWN, {})
            shown.update({key: f"{value:.3g}" for key, value in values.items()})
            bar.set_postfix(shown)
