"""Matrix entropy in the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState

from matent_callbacks.accumulate.catalogue import Embedding, Solver
from matent_callbacks.callbacks.charts import Charts
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.run_monitor import Logged, RunMonitor
from matent_callbacks.capture.layers import LayerSpec
from matent_callbacks.transformers._measuring import MeasuringCallback, Wrapper, log_record
from matent_callbacks.transformers._padding_samples import counted_samples
from matent_callbacks.transformers._reporters import log_settings, show, takes_pictures, wandb_name, wandb_runs


class MatrixEntropyCallback(MeasuringCallback):
    """Logs matrix entropy, effective rank and the like of a model's hidden states while a ``Trainer`` trains it.

    Where the Trainer logs at a monitored step, the values are in its record, beside the loss. Elsewhere they get a
    record of their own under that step, so the Trainer's records are what they are without the callback. Every reporter
    (W&B, TensorBoard, ...) and ``state.log_history`` have them. In evaluation they are among the metrics, so that
    ``metric_for_best_model`` and early stopping can use them.

    ============================================  ===================================================================
    ``<metric>/<layer>``                          at each monitored step
    ``eval_<metric>/<layer>``                     in evaluation (or the prefix that ``evaluate`` is given)
    ``diff_erank/<layer>``                        with ``reference``: its effective rank minus that of the model now
    ``nonfinite_tokens/<layer>``                  in training, where tokens were left out because they held NaN or Inf
    ``matrix_entropy_error/<layer>``              of estimated layers: standard error of the entropy, nats
    ============================================  ===================================================================

    Without ``probe`` the training forward of the step is read as it happens, over all its micro-batches: no second
    forward, and the weights are those before the update. With ``probe`` the same batches are run in evaluation mode
    after the update, so that the curve is free of data noise and dropout, and the last record describes the model
    that is saved. Either way training is bitwise what it is without the callback. In a compiled model hooks do not
    fire: there the training forward is re-executed eagerly, from the same random state.

    If a trainer runs a model several times in a step (TRL's), only forwards with gradients are read in training: no
    generation, no reference. In evaluation nothing has gradients: there generation and a reference that is the model
    with other PEFT adapters active, or none, are left out.

    In a distributed run every rank logs the reading over the tokens of all ranks. Padding samples, which accelerate
    repeats to complete the last evaluation batch, count once, except where they cannot be identified: an iterable data
    set with ``dispatch_batches=False``, or a batch sampler without a ``batch_size``. If reading fails on one rank, only
    its share is missing; but under FSDP a probe whose forward fails on one rank leaves the others waiting in theirs.

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
        >>> from matent_callbacks.transformers import MatrixEntropyCallback
        >>> callback = MatrixEntropyCallback(every_n_steps=50, layers="all")
        >>> # Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback]).train()
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
        self._has_settings = False

    @property
    def settings(self) -> dict[str, str]:
        return self._run.settings

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        callbacks = trainer.callback_handler.callbacks
        others = [callback._run for callback in callbacks if isinstance(callback, MatrixEntropyCallback)]
        self._run.watch(trainer.model, owner=trainer, others=others)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return self._run.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._run.load_state_dict(state)

    def wrappers(self) -> dict[str, Wrapper]:
        # Around the steps, so that hooks exist only during a monitored forward and are removed whatever happens in it.
        return {
            **super().wrappers(),
            "training_step": (self._before_training_step, self._after_forward),
            "prediction_step": (self._before_prediction_step, self._after_forward),
            "_save_checkpoint": (self._before_saving, None),
        }

    def begin(self, state: TrainerState) -> None:
        self._run.run_begins(
            self.trainer.model,
            step=state.global_step,
            last_step=state.max_steps,
            directory=self.trainer.args.output_dir,
        )
        self.keep_state(state)

    def step_values(self, state: TrainerState) -> dict[str, float]:
        here = state.global_step, state.epoch
        last = state.global_step == state.max_steps
        values = self._run.step_ends(self.trainer.model, state.global_step, at=here, last=last) or {}
        own = values.pop(here, {})
        self._log_own_records(values)
        return own

    def begin_evaluation(self) -> None:
        self._run.evaluation_begins()

    def join_evaluation(self, model: nn.Module, batch: Any) -> None:
        # The first batch is over: it is run again, now that the method is wrapped.
        self.trainer.prediction_step(model, batch, prediction_loss_only=True)

    def evaluation_values(self) -> dict[str, float]:
        return self._run.evaluation_ends(self.trainer.model)

    def was_logged(self, values: Mapping[str, float]) -> None:
        super().was_logged(values)
        if not self._has_settings:
            # Not before: reporters open their runs when training begins, after this callback is called.
            self._has_settings = True
            with self.guard("what is measured among the settings of the run"):
                log_settings(self.trainer, self.settings, self.guard)
        self._show_pictures()

    def was_written(self, logs: Mapping[str, Any]) -> None:
        with self.guard("the choice of charts"):
            runs = wandb_runs(self.trainer)
            self._run.hide_charts(logs, runs, sent_as=wandb_name, step_metric="train/global_step")

    @guarded
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        here = state.global_step, state.epoch
        # Separately: the last step may have values from the background as well.
        self._log_own_records(self._run.late_values())
        self._log_own_records(self._run.run_ends(self.trainer.model, at=here, replaced=best_was_loaded))
        self._show_pictures(last=True)

    @guarded
    def _before_training_step(
        self, training_step: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Monitored is the model as it is called: prepared, wrapped, perhaps compiled.
        self._run.batch_begins(model, inputs, step=self.trainer.state.global_step, training_only=True)

    @guarded
    def _before_prediction_step(
        self, prediction_step: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self._in_evaluation:
            samples = counted_samples(self.trainer, inputs)
            self._run.evaluation_batch_begins(model, inputs, samples=samples)

    @guarded
    def _after_forward(self, output: Any) -> None:
        self._run.batch_ends()

    @guarded
    def _before_saving(self, save_checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        # So that the values until then are in the checkpoint's log.
        self._log_own_records(self._run.late_values())
        self._run.save_reference()

    def _log_own_records(self, values: Logged) -> None:
        """Log values in records of their own, each under its step."""
        for (step, epoch), own in values.items():
            with self.guard("the record of a measurement"):
                log_record(self.trainer, own, step=step, epoch=epoch)
                self._show_pictures()

    def _show_pictures(self, *, last: bool = False) -> None:
        with self.guard("pictures"):
            if self._run.has_pictures and takes_pictures(self.trainer):
                pictures = self._run.pictures(self.trainer.state.log_history, last=last)
                show(self.trainer, pictures, self.guard)
