"""Watches a training loop of one's own: when to measure, what to log, the probe, the reference, the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Solver
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.loggers import check_log, log_values, takers_of, to_each
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.run_monitor import Logged, RunMonitor
from matent_callbacks.capture.layers import LayerSpec


class LoopMonitor:
    """Logs matrix entropy, effective rank and the like of a model's hidden states in a training loop of one's own.

    It does what ``MatrixEntropyCallback`` does in a Trainer: the forwards inside ``with monitor.step(step):`` are read
    if the step is due, and nothing happens at other steps. Training is bitwise what it is without it.

    A step ends when the next one begins, when an evaluation begins, or with :meth:`close`; only then are its values
    computed, and logged under its own number. So a step may be entered several times, once for each micro-batch, and a
    probe is run with the weights after the update. ``step(step, ends=True)`` says that a block is the last of its step:
    the values are then logged when the block ends.

    Logged are ``<metric>/<layer>`` at each monitored step, ``eval_<metric>/<layer>`` over each evaluation, and whatever
    else :class:`matent_callbacks.transformers.MatrixEntropyCallback` lists.

    On several ranks, each has to make the same calls, and has the same values: those of the tokens of all ranks.

    Args:
        model: The model as it is trained: plain, or prepared by accelerate or Fabric, compiled, sharded.
        every_n_steps: Optimizer steps between two measurements.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        log: A function of values and step, an Accelerator, Fabric, a run of W&B or a SummaryWriter, used on every rank;
            ``None``: nothing is logged. Pictures go to all of these but a function.
        metrics: Names from the catalogue, which :class:`~matent_callbacks.EntropyMonitor` describes: ``matrix_entropy``
            (nats), ``effective_rank``, ``spectrum``, ``rankme``, ``embedding_effective_rank`` and more.
        probe: One batch (a mapping of the model's keyword arguments, or a tensor) or a list of them, which is read
            in evaluation mode in place of the training forwards; or a mapping of several named probes, which are read
            separately and logged as ``<probe>/<metric>/<layer>``.
        max_tokens: Upper bound on the tokens, without padding, that one reading accumulates per layer.
        embedding: Which vector stands for a sequence: the ``"mean"``, the ``"last"`` or the ``"first"`` of the tokens
            that count. A layer whose output is ``(B, d)``, such as a pooler, provides these vectors itself.
        exclude_sinks: Leave out attention sinks, as :class:`~matent_callbacks.EntropyMonitor` does.
        tokens: ``"all"``, or ``"labels"``: only those that count in the loss, with labels other than -100.
        on_error: ``"warn"``: an error in monitoring is warned about once, and training goes on; ``"raise"``.
        reference: For Diff-eRank, measured on the probe: ``"start"``, the model when training begins, or a model.
        mask: Function from a batch, also one of the probe, to its mask ``(B, T)``, which overrides the model's own.
        module: Path of the part of the model whose layers these are; ``None``: the language model, or the encoder.
        layer_offset: If ``model`` is a pipeline stage, the number of blocks in the stages before it.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``, whatever the model computes in.
        solver: ``"exact"``: from all eigenvalues. ``"auto"``: layers of d = 1,024 and more (and as many tokens) are
            estimated to 0.2 % from a few matrix products, 5 times as fast at d = 2,048 and 11 times at 4,096, with the
            standard error of the entropy as ``matrix_entropy_error/<layer>``. Warnings say once which layers that is,
            and which metrics still take all eigenvalues. ``"approximate"`` is the same as ``"auto"``.
        background: Decompose in a thread, on the CPU; the values are logged at the next measurement, or at the end.
        name: Prefix of the names of all values, for a second monitor with the same layers.
        window_steps: Number of optimizer steps that a measurement covers: the one that is due and the last ones before
            it. Metrics of one vector per sequence need more sequences than one step has.
        pictures: With two layers or more, log the profile through the layers and a heat map (needs matplotlib).
        process_group: The ranks whose tokens belong together; ``None``: those of the data- and context-parallel
            dimensions of the Accelerator's or Fabric's device mesh, or else all.
        context_group: The ranks that hold parts of the same sequences; ``None`` without ``process_group``: as the mesh.

    Raises:
        ValueError: For an argument out of range, an unknown metric or layer (with near matches), or a probe that holds
            no batch or cannot be run on the model.
        TypeError: If nothing can be logged with ``log``.

    Example:
        >>> import torch
        >>> from matent_callbacks import LoopMonitor
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> with LoopMonitor(model, 2, log=lambda values, step: print(step, sorted(values))) as monitor:
        ...     for step in range(1, 5):
        ...         with monitor.step(step):
        ...             loss = model(torch.randn(4, 16, 8)).square().mean()
        2 ['effective_rank/last', 'matrix_entropy/last']
        4 ['effective_rank/last', 'matrix_entropy/last']
    """

    def __init__(
        self,
        model: nn.Module,
        every_n_steps: int = 100,
        layers: LayerSpec = "last",
        *,
        log: Any = None,
        metrics: str | Iterable[str] = ("matrix_entropy", "effective_rank"),
        probe: Any = None,
        max_tokens: int | None = None,
        embedding: Embedding = "mean",
        exclude_sinks: bool = True,
        tokens: Literal["all", "labels"] = "all",
        on_error: Literal["warn", "raise"] = "warn",
        reference: Literal["start"] | nn.Module | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        module: str | None = None,
        layer_offset: int | None = None,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "auto",
        background: bool = False,
        name: str | None = None,
        window_steps: int = 1,
        pictures: bool = True,
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        check_log(log)
        self.guard = Guard(type(self).__name__, on_error)
        self._model = model
        self._log_to = log
        self._run = RunMonitor(self.guard, every_n_steps, on_error=on_error, **measured_arguments(given))
        # Where accelerate, Fabric and models have their device meshes.
        owner = SimpleNamespace(accelerator=log, strategy=getattr(log, "strategy", None), model=model)
        self._run.watch(model, owner=owner)
        self._began = self._resumed = self._under_way = False
        self._last = 0

    @contextmanager
    def step(self, step: int, *, batch: Any = None, ends: bool = False) -> Iterator[None]:
        """Read the forwards with gradients inside, if the step is due.

        Args:
            step: The number of the optimizer step that the forwards are of, from 0 or 1 on.
            batch: What the argument ``mask`` is called with.
            ends: This is the last micro-batch of the step: it ends with this block. With accelerate, pass
                ``accelerator.sync_gradients``.
        """
        self._begin_step(step)
        self._begin_batch(step, batch)
        try:
            yield
        except BaseException:
            self._end_batch(discard=True)
            raise
        self._end_batch()
        if ends:
            self._end_step()

    @contextmanager
    def evaluation(self, prefix: str = "eval") -> Iterator[dict[str, float]]:
        """Read the forwards inside; the values are in the dict that is given, and logged, when the block ends.

        Args:
            prefix: Put before the names of the values: ``"eval"`` gives ``eval_<metric>/<layer>``.
        """
        values: dict[str, float] = {}
        self._end_step()
        self._begin_evaluation()
        try:
            yield values
        finally:
            self._end_batch()
        found = self.guard.values("the values of an evaluation", lambda: self._run.evaluation_ends(self._model))
        values.update({f"{prefix}_{key}": value for key, value in found.items()})
        self._log({self._last: values})

    @guarded
    def evaluating(self, batch: Any, *, sample_mask: Tensor | None = None) -> None:
        """Tell, inside :meth:`evaluation`, which batch the next forwards are of; needed with the argument ``mask``.

        Args:
            batch: What ``mask`` is called with.
            sample_mask: ``(B,)``, false for samples that do not count, such as those that a sampler repeats.
        """
        self._run.evaluation_batch_begins(self._model, batch, samples=sample_mask)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types. It makes no collective call: one rank may do it alone."""
        state: dict[str, Any] = {}
        with self.guard("its state in the checkpoint"):
            state.update(self._run.state_dict())
        return state

    @guarded
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, before the first step."""
        self._resumed = True
        self._run.load_state_dict(state)

    @guarded
    def close(self) -> None:
        """End the last step, and log what is left: values from the background, those of the probe, pictures."""
        self._end_step()
        if self._began:
            self._log(self._run.run_ends(self._model, at=self._last))
            self._show_pictures(last=True)

    def __enter__(self) -> LoopMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        # After an error the other ranks may be anywhere: nothing is exchanged with them.
        if kind is None:
            self.close()

    @guarded
    def _begin_step(self, step: int) -> None:
        if self._under_way and step != self._last:
            self._end_step()
        self._last, self._under_way = step, True
        if not self._began:
            self._began = True
            around = getattr(self._log_to, "autocast", nullcontext)
            resumed = self._resumed or step > 1
            self._run.run_begins(self._model, step=step - 1, resumed=resumed, around=around)

    @guarded
    def _begin_batch(self, step: int, batch: Any) -> None:
        self._run.batch_begins(self._model, batch, step=step - 1, training_only=True)

    @guarded
    def _end_batch(self, *, discard: bool = False) -> None:
        self._run.batch_ends()
        if discard:
            self._run.discard_step()

    @guarded
    def _end_step(self) -> None:
        if self._under_way:
            self._under_way = False
            self._log(self._run.step_ends(self._model, self._last, at=self._last) or {})

    @guarded
    def _begin_evaluation(self) -> None:
        self._run.evaluation_begins()
        if self._run.mask is None:
            self._run.evaluation_batch_begins(self._model)

    def _log(self, logged: Logged) -> None:
        for step, values in logged.items():
            with self.guard("the log of the values"):
                if values and self._log_to is not None:
                    log_values(self._log_to, values, step)
            self._run.remember(step, values)
            self._show_pictures()

    def _show_pictures(self, *, last: bool = False) -> None:
        with self.guard("pictures"):
            if self._run.has_pictures and (found := takers_of(self._log_to)):
                to_each(found, self._run.pictures(last=last), self._last, self.guard)
