"""Prints one short line for each log record of a Hugging Face Trainer, in place of all its numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.plot._style import in_order
from matent_callbacks.transformers._attach import AttachedCallback


class ReadingPrinter(AttachedCallback):
    """Prints one short line for each log record: the step, the losses, and the first, the middle and the last layer.

    ``step    10  loss 6.512  effective_rank: layer_00 33.2, layer_02 3.44, last 3.46``

    It replaces what the Trainer's ``ProgressCallback`` or ``PrinterCallback`` would print of such a record: with all
    layers, dozens of numbers. The progress bar stays; so does the table in a notebook. Records without a loss or a
    reading, such as that of the run time at the end, are printed as usual. What is logged does not change. The lines
    are only printed during training.

    Args:
        metric: The logged name of the metric of which three layers are printed.
        on_error: ``"warn"``: an error is warned about once, and the Trainer prints as usual; ``"raise"``.

    Example:
        >>> from matent_callbacks.transformers import MatrixEntropyCallback, ReadingPrinter
        >>> callbacks = [MatrixEntropyCallback(every_n_steps=10, layers="all"), ReadingPrinter()]
    """

    order = 2

    def __init__(self, metric: str = "effective_rank", *, on_error: Literal["warn", "raise"] = "warn") -> None:
        self.guard = Guard(type(self).__name__, on_error)
        self.metric = metric
        self.start_over()

    def start_over(self) -> None:
        self._replaced: list[Any] = []

    def begin(self, state: TrainerState) -> None:
        for printer in self.trainer.callback_handler.callbacks:
            # Not where a user's subclass does something of its own.
            if type(printer).on_log in (ProgressCallback.on_log, PrinterCallback.on_log):
                # On the instance only: when training is over, it has the method of its class again.
                printer.on_log = functools.partial(self._print, printer)
                self._replaced.append(printer)

    @guarded
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for printer in self._replaced:
            vars(printer).pop("on_log", None)
        self._replaced = []

    def _print(
        self,
        printer: Any,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = None
        with self.guard("its lines") as attempt:
            if self.is_attached_to(self.trainer):
                line = reading_line(state.global_step, logs or {}, self.metric)
            if line is not None and state.is_world_process_zero:
                bar = getattr(printer, "training_bar", None)
                print(line, flush=True) if bar is None else bar.write(line)
        if line is None or attempt.failed:
            type(printer).on_log(printer, args, state, control, logs=logs, **kwargs)


def reading_line(step: int, record: Mapping[str, Any], metric: str) -> str | None:
    """Format the step, the losses, and the metric in the first, the middle and the last layer, by their logged names.

    ``None`` if the record holds none of these.
    """
    losses = [f"{key} {record[key]:.4g}" for key in record if key == "loss" or _is_held_out_loss(key)]
    layers: dict[str, list[str]] = {}
    for key in record:
        prefix, found, layer = key.partition(f"{metric}/")
        # Also that of an evaluation or of a probe with a name, but no metric that merely ends like this one.
        if found and (prefix in ("", "eval_") or prefix.endswith("/")) and layer not in (*STAGES, *TOWERS):
            layers.setdefault(prefix, []).append(layer)
    readings = []
    for prefix, names in layers.items():
        ordered = in_order(names)
        chosen = dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        values = ", ".join(f"{name} {record[f'{prefix}{metric}/{name}']:.3g}" for name in chosen)
        readings.append(f"{prefix}{metric}: {values}")
    return "  ".join([f"step {step:5}", *losses, *readings]) if losses or readings else None


def _is_held_out_loss(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_loss") and "/" not in key
