"""Matrix entropy in PyTorch Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Solver
from matent_callbacks.callbacks.charts import Charts
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.run_monitor import Logged, RunMonitor
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.lightning._measuring import MeasuringCallback
from matent_callbacks.lightning._padding_samples import counted_samples
from matent_callbacks.lightning._trainer import (
    checkpoint_folder,
    compiled_whole,
    draws_its_batches,
    log_settings,
    logging_step,
    planned_steps,
    publish,
    runs_of_wandb,
    show,
    takes_pictures,
)


class MatrixEntropyCallback(MeasuringCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while Lightning trains it.

    The values are logged with the module's own ``log``, so that every logger, the progress bar,
    ``ModelCheckpoint(monitor=...)``, ``EarlyStopping(monitor=...)`` and ``trainer.callback_metrics`` have them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``val_<metric>/<layer>``, ``test_...``        over each validation or test epoch; with several loaders one each,
                                                  with ``/dataloader_idx_0``, ``/dataloader_idx_1``, ... behind it
    ``diff_erank/<layer>``                        with ``reference``: its effective rank minus that of the model now
    ``nonfinite_tokens/<layer>``                  in training, where tokens were left out because they held NaN or Inf
    ``matrix_entropy_error/<layer>``              of estimated layers: standard error of the entropy, nats
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
        every_n_steps: Optimizer steps between two measurements.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        metrics: Names from the catalogue, which :class:`~matent_callbacks.EntropyMonitor` describes: ``matrix_entropy``
            (nats), ``effective_rank``, ``spectrum``, ``rankme``, ``embedding_effective_rank`` and more. With
            ``reference`` also what compares the tokens of the probe with it: ``drift`` (1 - debiased CKA, 0 where
            nothing moved), ``subspace_overlap`` (share of the 16 strongest directions, 1), ``token_cosine`` (mean, 1).
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
        exclude_sinks: Leave out attention sinks: tokens of a layer that are longer than 4 times the geometric mean of
            their sequence, if they are few, see :func:`~matent_callbacks.functional.sink_tokens`. In pretrained
            language models a layer's numbers would describe this one token. One warning says where they are.
            ``False``: they count.
        tokens: ``"all"``, or ``"labels"``: only those that count in the loss, such as the response in supervised
            fine-tuning. These have a label other than -100 in the ``labels`` ``(B, T)`` that the model's ``forward`` is
            given: the label at place t counts the token at place t, as the models of transformers take them, so it is
            the tokens of the response, not the places that predict them. The attention mask applies as well. In an
            encoder-decoder labels are of the decoder: ``module="decoder"``, where place t predicts label t. Where
            labels are missing or have another shape than the hidden states, numbers are NaN, and one warning says why.
        on_error: ``"warn"``: an error in monitoring is warned about once, and training goes on; ``"raise"``.
        reference: For Diff-eRank (Wei et al., NeurIPS 2024) and ``drift``, measured on the probe: ``"start"``, the
            model as it is when training begins (with PEFT, its adapter on), or a model with the same layers, such as
            one made by :func:`~matent_callbacks.untrained_like`.
        drift_tokens: How many tokens of the probe are compared with the reference at most, evenly spaced over those
            that count, always the same ones. Their hidden states in the reference are kept on the host: 2,048 tokens of
            33 layers with d = 4,096 take 0.55 GB in bfloat16. ``max_tokens`` does not bound them.
        mask: Function from a batch, also one of the probe, to its mask ``(B, T)``, for models that are not given one;
            it overrides their own.
        prog_bar: Show the values in the progress bar.
        module: Path of the part of the model whose layers these are; ``None``: the language model, or the encoder of
            an encoder-decoder.
        layer_offset: If ``model`` is a pipeline stage, the number of blocks in the stages before it. Layers are then
            selected and named by their numbers in the whole model; ``None``: ``model`` is the whole model.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``, whatever the model computes in.
        solver: ``"exact"``: from all eigenvalues. ``"auto"``: layers of d = 1,024 and more (and as many tokens) are
            estimated to 0.2 % from a few matrix products, 5 times as fast at d = 2,048 and 11 times at 4,096, with the
            standard error of the entropy as ``matrix_entropy_error/<layer>``. Warnings say once which layers that is,
            and which metrics still take all eigenvalues. ``"approximate"`` is the same as ``"auto"``.
        background: Decompose in a background thread, on the CPU, while training goes on: for wide models on a GPU. The
            values are logged under their own step, but only at the next measurement, checkpoint, or end of training.
        name: Prefix of the names of all values, ``<name>/<metric>/<layer>`` and ``eval_<name>/...``: for a second
            callback with the same layers.
        window_steps: Number of optimizer steps that a measurement covers: the one that is due and the last ones before
            it. Metrics of one vector per sequence need more sequences than one step has.
        pictures: With two layers or more, log two panels of all of them to W&B, TensorBoard, MLflow, Comet, Trackio
            and SwanLab: the profile through the layers at the steps so far, and layer by step as heat maps of the
            values and of their change; and a third of drift by depth, where that is logged (needs matplotlib).
        charts: With more than 6 layers, W&B draws charts of its own only of the first, the middle and the last one
            (``"few"``), or of all (``"all"``). All values are logged, and can be put into panels, either way.
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
        >>> # checkpoints = ModelCheckpoint(monitor="val_effective_rank/last", mode="max")
        >>> # Trainer(callbacks=[callback, checkpoints]).fit(module, data)
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
        exclude_sinks: bool = True,
        tokens: Literal["all", "labels"] = "all",
        on_error: Literal["warn", "raise"] = "warn",
        reference: Literal["start"] | nn.Module | None = None,
        drift_tokens: int = 2048,
        mask: Callable[[Any], Tensor | None] | None = None,
        prog_bar: bool = False,
        module: str | None = None,
        layer_offset: int | None = None,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "auto",
        background: bool = False,
        name: str | None = None,
        window_steps: int = 1,
        pictures: bool = True,
        charts: Charts = "few",
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        self.guard = Guard(type(self).__name__, on_error)
        self.every_n_steps = every_n_steps
        self.during_eval = during_eval
        self.prog_bar = prog_bar
        self.name = name
        self._run = RunMonitor(self.guard, every_n_steps, on_error=on_error, **measured_arguments(given))
        self.steps_until_logged = self._run.steps_until_logged
        self.start_over()

    def start_over(self) -> None:
        super().start_over()
        self._run = self._run.renewed(self.guard)
        self._draws: bool | None = None

    @guarded
    def state_dict(self) -> dict[str, Any]:
        return self._run.state_dict()

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run.load_state_dict(state_dict)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._find_layers(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._draws = None
        self._find_layers(trainer, pl_module)
        if not self.off:
            with self.guard("what is measured among the settings of the run"):
                log_settings(trainer, self._run.settings, self.guard)
            self._run.run_begins(
                pl_module,
                step=trainer.global_step,
                last_step=planned_steps(trainer, pl_module),
                around=trainer.precision_plugin.forward_context,
                directory=checkpoint_folder(trainer),
            )

    @guarded
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # An accumulation may have been cut short by an exception or a loader that ended early: its gradients are
        # discarded as well.
        if not self.off:
            self._run.discard_step()

    @guarded
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.off:
            return
        if self._draws is None:
            self._draws = draws_its_batches(pl_module.training_step)
        given = None if self._draws else batch
        completes = 1 if pl_module.automatic_optimization else None
        step = trainer.global_step
        self._run.batch_begins(pl_module, given, step=step, completes=completes, batch_mask=_mask_of(given))

    @guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.guard("the end of reading a batch"):
            self._run.batch_ends()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # A module that skips the rest of an epoch does so after a batch began, and that batch never ends.
        with self.guard("the end of reading a batch"):
            self._run.batch_ends()
        super().on_train_epoch_end(trainer, pl_module)

    def step_values(self, trainer: Any, pl_module: Any, *, due: bool, last: bool) -> dict[str, float] | None:
        here = logging_step(trainer)
        values = self._run.step_ends(pl_module, trainer.global_step, at=here, last=last)
        if values is None:
            return None
        own = values.pop(here, {})
        self._publish(trainer, values)
        return own

    def was_logged(self, trainer: Any, values: dict[str, float], *, step: int) -> None:
        self._run.remember(step, values)
        self._hide_charts(trainer, values)
        self._show_pictures(trainer)

    @guarded
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # So that a run that resumes from here has the values until then.
        self._publish(trainer, self._run.late_values())
        self._run.save_reference()

    @guarded
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.off:
            self._publish(trainer, self._run.late_values())
            self._show_pictures(trainer, last=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_evaluation(trainer, pl_module, alone=trainer.state.fn == "validate")

    @guarded
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._reads_evaluation(trainer, pl_module):
            return
        draws = draws_its_batches(pl_module.test_step if trainer.testing else pl_module.validation_step)
        given = None if draws else batch
        samples = None if draws else counted_samples(trainer, batch_idx, dataloader_idx)
        self._run.evaluation_batch_begins(
            pl_module, given, data_set=dataloader_idx, batch_mask=_mask_of(given), samples=samples
        )

    @guarded
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run.batch_ends()

    @guarded
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "val", len(trainer.num_val_batches))

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_evaluation(trainer, pl_module, alone=True)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    @guarded
    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_evaluation(trainer, pl_module, "test", len(trainer.num_test_batches))

    @guarded
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._run.batch_ends()

    # Internals

    def _find_layers(self, trainer: Any, pl_module: Any) -> None:
        """Set up the monitor before the first batch, so that a wrong configuration raises before training."""
        # Not in `setup`: that of the module, and its `configure_model`, come after it and may make the model.
        if self.off:
            return
        others = [callback._run for callback in trainer.callbacks if isinstance(callback, MatrixEntropyCallback)]
        self._run.watch(pl_module, owner=trainer, others=others)
        if not self._run.has_probe and compiled_whole(pl_module):
            self.off = True
            warnings.warn(
                "The LightningModule is compiled as a whole, and hooks cannot fire inside: pass `probe`, which is run "
                "beside the graph, or compile the transformer in it instead. No readings are taken.",
                stacklevel=2,
            )

    def _publish(self, trainer: Any, values: Logged) -> None:
        """Log values from the background, each under its step."""
        for step, own in values.items():
            with self.guard("the log of a background reading"):
                publish(trainer, own, self.guard, step=step)
                self.was_logged(trainer, own, step=step)

    def _show_pictures(self, trainer: Any, *, last: bool = False) -> None:
        with self.guard("pictures"):
            if self._run.has_pictures and takes_pictures(trainer):
                show(trainer, self._run.pictures(last=last), self.guard, step=logging_step(trainer))

    def _reads_evaluation(self, trainer: Any, pl_module: Any) -> bool:
        return self.during_eval and not (self.off or trainer.sanity_checking or compiled_whole(pl_module))

    def _begin_evaluation(self, trainer: Any, pl_module: Any, *, alone: bool) -> None:
        if alone:
            self._find_layers(trainer, pl_module)
        with self.guard("the reset of the reading before an evaluation"):
            self._run.evaluation_begins()

    def _log_evaluation(self, trainer: Any, pl_module: Any, prefix: str, num_loaders: int) -> None:
        if not self._reads_evaluation(trainer, pl_module):
            return
        for index in range(num_loaders):
            values = self._run.evaluation_ends(pl_module, data_set=index)
            named = self.log_evaluation(trainer, pl_module, prefix, values, loader=index, loaders=num_loaders)
            self._hide_charts(trainer, named)

    def _hide_charts(self, trainer: Any, names: Iterable[str]) -> None:
        with self.guard("the choice of charts"):
            self._run.hide_charts(names, runs_of_wandb(trainer), step_metric="trainer/global_step")


def _mask_of(batch: Any) -> Tensor | None:
    """Return the mask in a batch, which the module may not pass on to the model."""
    own = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return own if isinstance(own, Tensor) and own.ndim == 2 else None
