"""The Lightning callback: translates Lightning's hooks and logging; the numbers are the monitor's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Solver
from matent_callbacks.callbacks.entropy_callback import SharedEntropyCallback
from matent_callbacks.callbacks.guard import unguarded
from matent_callbacks.callbacks.layer_pictures import thinned
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.lightning._loggers import show, takes_pictures
from matent_callbacks.lightning._monitored_steps import MeasuringCallback
from matent_callbacks.lightning._sampler_padding import counted_samples
from matent_callbacks.lightning._trainer import (
    compiled_whole,
    draws_its_batches,
    log,
    logging_step,
    planned_steps,
    publish,
    takes_names_with_a_loader,
)
from matent_callbacks.monitor import EntropyMonitor


class MatrixEntropyCallback(SharedEntropyCallback, MeasuringCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while Lightning trains it.

    The values are logged with the module's own ``log``, so that every logger, the progress bar,
    ``ModelCheckpoint(monitor=...)``, ``EarlyStopping(monitor=...)`` and ``trainer.callback_metrics`` have them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``val_<metric>/<layer>``, ``test_...``        over each validation or test epoch; with several loaders one each,
                                                  with ``/dataloader_idx_0``, ``/dataloader_idx_1``, ... behind it
    ``diff_erank/<layer>``                        with ``reference``: its effective rank minus that of the model now
    ``nonfinite_tokens/<layer>``                  in training, where tokens were left out because they held NaN or Inf
    ``matrix_entropy_error/<layer>``              with ``solver="approximate"``: the standard error of the entropy, nats
    ============================================  ===================================================================

    The transformer is found inside the LightningModule: a Hugging Face model, or else the outermost stack of blocks
    (``nn.TransformerEncoder``, a vision transformer, a module of your own); ``module`` selects one if there are
    several. Without ``probe`` the training forward is read as it happens, over all batches of the optimizer step, with
    the weights before the update; with it the probe's batches are run in evaluation mode after the update. Either way
    training is bitwise what it is without the callback. ``Trainer(barebones=True)`` logs nothing and is not read.

    In a distributed run every rank logs the reading over the tokens of all ranks. Padding samples that a
    ``DistributedSampler`` repeats in evaluation count once; those of other samplers, and in batches of no fixed size,
    count as often as they come. If reading fails on one rank, only its share is missing; but under FSDP a probe whose
    forward fails on one rank leaves the others waiting in theirs.

    Args:
        every_n_steps: Optimizer steps between two readings.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        metrics: Names from the catalogue, which :class:`~matent_callbacks.EntropyMonitor` describes: ``matrix_entropy``
            (nats), ``effective_rank``, ``spectrum``, ``rankme``, ``embedding_effective_rank`` and more.
        probe: One batch (a mapping of the model's keyword arguments, or a tensor) or a list of them, which is read
            in evaluation mode in place of the training forwards; or a mapping of several named probes, which are read
            separately and logged as ``<probe>/<metric>/<layer>``. It is run through the model that is trained, PEFT
            included. A module of your own around a Hugging Face model is run by its own ``forward`` if that takes the
            names in the batch, all of them, and needs no others; or else the model inside is run.
        during_eval: Also read the forwards of evaluation.
        max_tokens: Upper bound on the tokens that one reading accumulates per layer; the first ones count, and padding
            is none of them.
        embedding: Which vector stands for a sequence: the ``"mean"``, the ``"last"`` or the ``"first"`` of the tokens
            that count. A layer whose output is ``(B, d)``, such as a pooler or a projection, or has the
            ``sentence_embedding`` of sentence-transformers, provides these vectors itself.
        on_error: ``"warn"``: an error in monitoring is warned about once, and training goes on; ``"raise"``.
        reference: For Diff-eRank (Wei et al., NeurIPS 2024), measured on the probe: ``"start"``, the model as it is
            when training begins, or a model, such as one made by :func:`~matent_callbacks.untrained_like`.
        mask: Function from a batch, also one of the probe, to its mask ``(B, T)``, for models that are not given one;
            it overrides their own.
        prog_bar: Show the values in the progress bar.
        module: Path of the part of the model whose layers these are; ``None``: the language model, or the encoder of
            an encoder-decoder.
        layer_offset: If ``model`` is a pipeline stage, the number of blocks in the stages before it. Layers are then
            selected and named by their numbers in the whole model; ``None``: ``model`` is the whole model.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``, whatever the model computes in.
        solver: ``"exact"``, or ``"approximate"``: from d = 1,024 on (or as many tokens, if they are fewer) the entropy
            is estimated without the eigenvalues, 6 times as fast or more and off by less than 1 %; its standard error
            is ``matrix_entropy_error/<layer>``. It supports ``matrix_entropy``, ``normalized_matrix_entropy``,
            ``effective_rank``, the first and the last also of embeddings, and means over sequences, which stay exact.
        background: Decompose in a background thread, on the CPU, while training goes on: for wide models on a GPU. The
            values are logged under their own step, but only at the next reading, checkpoint, or end of training.
        name: Prefix of the names of all values, ``<name>/<metric>/<layer>`` and ``eval_<name>/...``: for a second
            callback with the same layers.
        window_steps: Number of optimizer steps that a reading covers: the one that is due and the last ones before it.
            Metrics of one vector per sequence need more sequences than one step has.
        pictures: With two layers or more, log two panels of all of them to W&B, TensorBoard, MLflow, Comet and Trackio:
            the profile through the layers at the steps so far, and layer by step as a heat map (needs matplotlib).
        process_group: The ranks whose tokens belong together; ``None``: those of the data- and context-parallel
            dimensions of the Trainer's device mesh, or else all.
        context_group: The ranks that hold parts of the same sequences, as in context parallelism; ``None`` without
            ``process_group``: those of the mesh. Packed batches are refused with such ranks.

    Raises:
        ValueError: Here for an argument out of range, an unknown metric, or a probe that holds no batch (rows of a data
            set, text, a loader); before training for an unknown layer, with near matches, and for a second callback
            that would log the same names.

    Example:
        >>> from matent_callbacks.lightning import MatrixEntropyCallback
        >>> callback = MatrixEntropyCallback(every_n_steps=50, layers="all")
        >>> # Trainer(callbacks=[callback, ModelCheckpoint(monitor="val_effective_rank/last", mode="max")]).fit(module, data)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        layers: LayerSpec = "last",
        *,
        metrics: str | Iterable[str] = ("matrix_entropy", "effective_rank"),
        probe: Any = None,
        during_eval: bool = True,
        max_tokens: int | None = None,
        embedding: Embedding = "mean",
        on_error: Literal["warn", "raise"] = "warn",
        reference: Literal["start"] | nn.Module | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        prog_bar: bool = False,
        module: str | None = None,
        layer_offset: int | None = None,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "exact",
        background: bool = False,
        name: str | None = None,
        window_steps: int = 1,
        pictures: bool = True,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            every_n_steps,
            layers,
            metrics=metrics,
            probe=probe,
            during_eval=during_eval,
            max_tokens=max_tokens,
            embedding=embedding,
            on_error=on_error,
            reference=reference,
            mask=mask,
            prog_bar=prog_bar,
            module=module,
            layer_offset=layer_offset,
            dtype=dtype,
            solver=solver,
            background=background,
            name=name,
            window_steps=window_steps,
            pictures=pictures,
            process_group=process_group,
            context_group=context_group,
        )

    def start_over(self) -> None:
        super().start_over()
        self._late: tuple[int, Callable[[], dict[str, float]]] | None = None
        self._records: list[dict[str, float]] = []
        self._open: EntropyMonitor | None = None
        self._skipped = False
        self._overdue = False
        self._loaders: dict[int, EntropyMonitor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {**self._measurement.state_dict(), "records": self._records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measurement.load_state_dict(state_dict)
        self._records = list(state_dict["records"])

    @unguarded
    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._find_layers(trainer, pl_module)

    @unguarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._late = None
        self._skipped = self._overdue = False
        self._find_layers(trainer, pl_module)
        if not self.off:
            self.warn_if_never_due(planned_steps(trainer, pl_module))
            with self.guard("the reference"):
                self._measurement.reset()
                around = trainer.precision_plugin.forward_context
                self._measurement.begin(pl_module, resumed=trainer.global_step > 0, around=around)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Discard an accumulation that was cut short by an exception or a loader that ended early: its gradients are
        # discarded as well. A window of several steps continues across the end of an epoch.
        if not self.off:
            self._skipped = False
            if self.window_steps == 1:
                self._measurement.reset()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.off or self._measurement.probes:
            return
        if self._overdue or self.may_become_due(trainer, pl_module, ahead=self.window_steps - 1):
            given = None if draws_its_batches(pl_module.training_step) else batch
            self._start(lambda: self._measurement.monitor(pl_module), given)
        else:
            self._skipped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.guard("the end of reading a batch"):
            self._stop()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # A module that skips the rest of an epoch does so after a batch began, and that batch never ends.
        with self.guard("the end of reading a batch"):
            self._stop()
        super().on_train_epoch_end(trainer, pl_module)

    def step_values(self, trainer: Any, pl_module: Any, *, due: bool, last: bool) -> dict[str, float] | None:
        if not self._measurement.probes:
            values = self._measurement.from_forwards() if self._is_read(trainer, due=due) else None
        elif due or last:
            # Also at the end, so that the last record describes the model that is saved.
            values = self._measurement.from_probe(pl_module, around=trainer.precision_plugin.forward_context)
        else:
            values = None
        if values is None:
            return None
        if not self._measurement.background:
            return values()
        self._log_late(trainer)
        self._late = logging_step(trainer), values
        return {}

    def was_logged(self, trainer: Any, values: dict[str, float], *, step: int) -> None:
        if self._pictures is None:
            return
        self._records = thinned([*self._records, {"step": step, **self._pictures.shown(values)}])
        self._show_pictures(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # So that a run that resumes from here has the readings until then.
        self._log_late(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.off:
            self._log_late(trainer)
            self._show_pictures(trainer, last=True)

    @unguarded
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._loaders = {}
        if trainer.state.fn == "validate":
            self._find_layers(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_evaluation_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "val", len(trainer.num_val_batches))

    @unguarded
    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._loaders = {}
        self._find_layers(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_evaluation_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop()

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "test", len(trainer.num_test_batches))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    # Internals

    def _find_layers(self, trainer: Any, pl_module: Any) -> None:
        """Set up the monitor before the first batch, so that a wrong configuration raises before training."""
        # Not in `setup`: that of the module, and its `configure_model`, come after it and may make the model.
        if self.off:
            return
        self.watch(pl_module, trainer, trainer.callbacks)
        if not self._measurement.probes and compiled_whole(pl_module):
            self.off = True
            warnings.warn(
                "The LightningModule is compiled as a whole, and hooks cannot fire inside: pass `probe`, which is run "
                "beside the graph, or compile the transformer in it instead. No readings are taken.",
                stacklevel=2,
            )

    def _is_read(self, trainer: Any, *, due: bool) -> bool:
        """Whether a reading of the optimizer step that is over is due and covers all of it.

        One that was not expected to be due, because a batch made more steps than any before it, is taken from the next
        batch.
        """
        due = due or self._overdue
        skipped, self._skipped = self._skipped, False
        self._overdue = due and skipped
        in_window = -trainer.global_step % self.every_n_steps < self.window_steps
        if not (due or skipped or in_window):
            self._measurement.reset()
        return due and not skipped

    def _start(
        self,
        monitor: Callable[[], EntropyMonitor],
        batch: Any,
        samples: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        # If this fails, the batch is not read, and this rank contributes less to the common reading.
        with self.guard("batches that no mask could be made of") as making:
            mask = self.mask_of(batch) if self.mask is not None else _own_mask(batch)
        if not making.failed:
            self._open = monitor()
            self._open.start(same_adapters=True, attention_mask=mask, sample_mask=samples())

    def _stop(self) -> None:
        monitor, self._open = self._open, None
        if monitor is not None:
            monitor.stop()

    def _log_late(self, trainer: Any) -> None:
        late, self._late = self._late, None
        if late is None:
            return
        # All ranks wait for the values; what can fail on one of them comes after that.
        step, values = late[0], late[1]()
        with self.guard("the log of a background reading"):
            publish(trainer, values, self.guard, step=step)
            self.was_logged(trainer, values, step=step)

    def _show_pictures(self, trainer: Any, *, last: bool = False) -> None:
        with self.guard("pictures"):
            if self._pictures is None or not takes_pictures(trainer):
                return
            pictures = self._pictures.draw(self._records, self._measurement.layer_names, last=last)
            show(trainer, pictures, self.guard, step=logging_step(trainer))

    def _reads_evaluation(self, trainer: Any, pl_module: Any) -> bool:
        return self.during_eval and not (self.off or trainer.sanity_checking or compiled_whole(pl_module))

    def _start_evaluation_batch(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if not self._reads_evaluation(trainer, pl_module):
            return

        def monitor() -> EntropyMonitor:
            if dataloader_idx not in self._loaders:
                self._loaders[dataloader_idx] = self._measurement.new_monitor(pl_module)
            return self._loaders[dataloader_idx]

        step = pl_module.test_step if trainer.testing else pl_module.validation_step
        if draws_its_batches(step):
            self._start(monitor, None)
        else:
            self._start(monitor, batch, lambda: counted_samples(trainer, batch_idx, dataloader_idx))

    def _log_evaluation(self, trainer: Any, pl_module: Any, prefix: str, num_loaders: int) -> None:
        if not self._reads_evaluation(trainer, pl_module):
            return
        # Also for a loader without a batch on this rank: the other ranks wait for this one.
        for index in range(num_loaders):
            suffix = f"/dataloader_idx_{index}" if num_loaders > 1 else ""
            monitor = self._loaders.get(index) or self._measurement.new_monitor(pl_module)
            values = self._measurement.values(monitor)
            named = {f"{prefix}_{key}{suffix}": value for key, value in values.items()}
            with self.guard("the readings of an evaluation"):
                if suffix and not takes_names_with_a_loader(trainer):
                    publish(trainer, named, self.guard)
                else:
                    log(pl_module, named, prog_bar=self.prog_bar, add_dataloader_idx=False)
        self._loaders = {}


def _own_mask(batch: Any) -> Tensor | None:
    """Return the mask in a batch, which the module may not have passed on to the model."""
    own = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return own if isinstance(own, Tensor) and own.ndim == 2 else None
