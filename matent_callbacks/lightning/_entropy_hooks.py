"""The Lightning callback: translates Lightning's hooks and logging; the numbers are the monitor's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Solver
from matent_callbacks.callbacks.guard import Guard, unguarded
from matent_callbacks.callbacks.layer_pictures import LayerPictures, thinned
from matent_callbacks.callbacks.measurement import Measurement
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.lightning._loggers import show, takes_pictures
from matent_callbacks.lightning._monitored_steps import MeasuringCallback
from matent_callbacks.lightning._sampler_padding import counted_samples
from matent_callbacks.lightning._trainer import draws_its_batches, log, logging_step, publish
from matent_callbacks.monitor import EntropyMonitor


class MatrixEntropyCallback(MeasuringCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while Lightning trains it.

    The values are logged with the module's own ``log``, so that every logger, the progress bar,
    ``ModelCheckpoint(monitor=...)``, ``EarlyStopping(monitor=...)`` and ``trainer.callback_metrics`` have them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``val_<metric>/<layer>``, ``test_...``        over each validation or test epoch; with several loaders one each,
                                                  with ``/dataloader_idx_0``, ``/dataloader_idx_1``, ... behind it
    ``diff_erank/<layer>``                        with ``reference``: its effective rank minus that of the model now
    ``nonfinite_tokens/<layer>``                  where tokens were left out because they held NaN or Inf
    ``matrix_entropy_error/<layer>``              with ``solver="approximate"``: the standard error of the entropy, nats
    ============================================  ===================================================================

    The transformer is found inside the LightningModule: a Hugging Face model, or else the outermost stack of blocks
    (``nn.TransformerEncoder``, a vision transformer, a module of your own); ``module`` says which where there are
    several. Without ``probe`` the training forward is read as it happens, over all batches of the optimizer step, with
    the weights before the update; with it the same batches are run in evaluation mode after the update. Either way
    training is bitwise what it is without the callback. ``Trainer(barebones=True)`` logs nothing and is not read.

    In a distributed run every rank logs the reading of the tokens of all. Samples that a ``DistributedSampler`` repeats
    in evaluation count once; those of other samplers, and of batches of no fixed size, count as often as they come.
    What fails on one rank costs its share of the reading; but under FSDP a probe whose forward fails on one rank only
    leaves the others waiting in theirs.

    Args:
        every_n_steps: Optimizer steps between two readings.
        layers: As in :class:`~matent_callbacks.EntropyMonitor`: ``"last"``, ``"all"``, ints, ``"every:4"``, module
            names or globs, or a list of these.
        metrics: Names of the catalogue of :class:`~matent_callbacks.EntropyMonitor`.
        probe: One batch (a mapping of keyword arguments of the Hugging Face model inside, or else of the
            LightningModule's forward; or a tensor) or a list of them.
        during_eval: Also read validation and test forwards.
        max_tokens: Upper bound on the tokens that one reading accumulates per layer.
        on_error: ``"warn"``: what goes wrong in monitoring is said once and training goes on; ``"raise"``.
        reference: For Diff-eRank (Wei et al., NeurIPS 2024), measured on the probe: ``"start"``, the model as it is
            when training begins, or a model, such as :func:`~matent_callbacks.untrained_like` makes.
        mask: From a batch to its mask ``(B, T)``, for models that are given none; ``None``: the batch's own
            ``attention_mask``, if it has one.
        prog_bar: Show the values in the progress bar.
        module: Path of the part of the LightningModule whose layers these are.
        dtype: Of the statistics, float32 or float64.
        solver: ``"exact"``, or ``"approximate"`` for models of width 1,024 and more, as in
            :class:`~matent_callbacks.EntropyMonitor`.
        background: Decompose in a thread of its own, on the CPU, while training goes on: for wide models on a GPU. The
            values of a step are logged under it, but only at the next reading, checkpoint, or end.
        pictures: With two layers or more, give the loggers of W&B, TensorBoard, MLflow and Comet two panels of all
            layers: the profile through them at the steps so far, and layer by step as a heat map (needs matplotlib).

    Raises:
        ValueError: Here for an argument out of range or an unknown metric; at setup for an unknown layer, with near
            matches.

    Example:
        >>> from matent_callbacks.lightning import MatrixEntropyCallback
        >>> callback = MatrixEntropyCallback(every_n_steps=50, layers="all")
        >>> # Trainer(callbacks=[callback, ModelCheckpoint(monitor="val_effective_rank/last")]).fit(module, data)
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
        on_error: Literal["warn", "raise"] = "warn",
        reference: Literal["start"] | nn.Module | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        prog_bar: bool = False,
        module: str | None = None,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "exact",
        background: bool = False,
        pictures: bool = True,
    ) -> None:
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self._mask = mask
        self._measurement = Measurement(
            every_n_steps,
            layers,
            metrics=metrics,
            probe=probe,
            reference=reference,
            max_tokens=max_tokens,
            on_error=on_error,
            guard=self.guard,
            module=module,
            dtype=dtype,
            solver=solver,
            background=background,
        )
        self._with_pictures = pictures
        self._settings = {
            "every_n_steps": every_n_steps,
            "layers": layers,
            "metrics": self._measurement.metrics,
            "module": module,
            "probe": probe is not None,
        }
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._measurement = self._measurement.renewed(self.guard)
        self._late: tuple[int, Callable[[], dict[str, float]]] | None = None
        self._pictures = LayerPictures(self._measurement.metrics) if self._with_pictures else None
        self._records: list[dict[str, float]] = []
        self._open: EntropyMonitor | None = None
        self._skipped = False
        self._overdue = False
        self._loaders: dict[int, EntropyMonitor] = {}

    @property
    def state_key(self) -> str:
        return str(self._generate_state_key(**self._settings))

    def state_dict(self) -> dict[str, Any]:
        return {**self._measurement.state_dict(), "records": self._records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measurement.load_state_dict(state_dict)
        self._records = list(state_dict["records"])

    @unguarded
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.off:
            return
        # Unknown layers are told before training.
        self._measurement.monitor(pl_module)
        if self._measurement.probe is None and _compiled_whole(pl_module):
            self.off = True
            warnings.warn(
                "The LightningModule is compiled as a whole, and hooks cannot fire inside: pass `probe`, which is run "
                "beside the graph, or compile the transformer in it instead. No readings are taken.",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._late = None
        self._skipped = self._overdue = False
        if not self.off:
            self._measurement.begin(pl_module, around=trainer.precision_plugin.forward_context)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Of an accumulation that was broken off, by an exception or a loader that ended early: its gradients are
        # discarded as well.
        if not self.off:
            self._skipped = False
            self._measurement.reset()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.off or self._measurement.probe is not None:
            return
        if self._overdue or self.may_become_due(trainer, pl_module):
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
        if self._measurement.probe is None:
            values = self._measurement.from_forwards() if self._is_read(due=due) else None
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
        # A run that goes on from here has the readings until then.
        self._log_late(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.off:
            self._log_late(trainer)
            self._show_pictures(trainer, last=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._loaders = {}

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

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._loaders = {}

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

    # Inside

    def _is_read(self, *, due: bool) -> bool:
        """Whether a reading of the optimizer step that is over is due and covers all of it.

        One that is due and was not expected to be, since more steps were made in a batch than ever before, is taken
        from the next batch.
        """
        due = due or self._overdue
        skipped, self._skipped = self._skipped, False
        self._overdue = due and skipped
        if not (due or skipped):
            self._measurement.reset()
        return due and not skipped

    def _start(
        self,
        monitor: Callable[[], EntropyMonitor],
        batch: Any,
        samples: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        # Where this fails the batch is not read, and the rank has the less to bring to the reading of all.
        with self.guard("batches that no mask could be made of") as making:
            mask = self._mask_of(batch)
        if not making.failed:
            self._open = monitor()
            self._open.start(attention_mask=mask, sample_mask=samples())

    def _mask_of(self, batch: Any) -> Tensor | None:
        if self._mask is not None:
            if batch is None:
                raise ValueError("`mask` is made from the batch, and a step that takes `dataloader_iter` gives none.")
            return self._mask(batch)
        own = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return own if isinstance(own, Tensor) and own.ndim == 2 else None

    def _stop(self) -> None:
        monitor, self._open = self._open, None
        if monitor is not None:
            monitor.stop()

    def _log_late(self, trainer: Any) -> None:
        late, self._late = self._late, None
        if late is None:
            return
        # Waited for on all ranks; what can fail on one comes after it.
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
        return self.during_eval and not (self.off or trainer.sanity_checking or _compiled_whole(pl_module))

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
        # Also of a loader that had no batch on this rank: the others wait for it.
        for index in range(num_loaders):
            suffix = f"/dataloader_idx_{index}" if num_loaders > 1 else ""
            monitor = self._loaders.get(index) or self._measurement.new_monitor(pl_module)
            values = self._measurement.values(monitor)
            named = {f"{prefix}_{key}{suffix}": value for key, value in values.items()}
            with self.guard("the readings of an evaluation"):
                if suffix and not _takes_names_with_a_loader(trainer):
                    publish(trainer, named, self.guard)
                else:
                    log(pl_module, named, prog_bar=self.prog_bar, add_dataloader_idx=False)
        self._loaders = {}


def _compiled_whole(pl_module: Any) -> bool:
    """Whether ``torch.compile`` was called on the LightningModule itself."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def _takes_names_with_a_loader(trainer: Any) -> bool:
    """Whether ``self.log`` takes a name that ends in ``/dataloader_idx_0``: Lightning before 2.5.3 raises."""
    package = type(trainer.fit_loop).__module__.partition(".")[0]
    return Version(version(package)) >= Version("2.5.3")
