"""Watches a training loop of one's own: when to measure, what to log, the probe, the reference, the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import Embedding, Solver
from matent_callbacks.callbacks.charts import Charts
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.loop_log import LoopLog
from matent_callbacks.callbacks.measurement import measured_arguments
from matent_callbacks.callbacks.run_monitor import RunMonitor
from matent_callbacks.capture.layers import LayerSpec


class LoopMonitor:
    """Logs matrix entropy, effective rank and the like of a model's hidden states in a training loop of one's own.

    It does what ``MatrixEntropyCallback`` does in a Trainer: the forwards inside ``with monitor.step(step):`` are read
    if the step is due, and nothing happens at other steps. Training is bitwise what it is without it.

    A step ends when the next one begins, when an evaluation begins after it, or with :meth:`close`; only then are its
    values computed, and logged under its number. So a step may be entered several times, once for each micro-batch, and
    a probe is run with the weights after the update. ``step(step, ends=True)`` says that a block is the last of a step.
    Logged is what :class:`matent_callbacks.transformers.MatrixEntropyCallback` lists. Every rank has to make the same
    calls, and has the same values: those of the tokens of all ranks.

    Args:
        model: The model as it is trained: plain, or prepared by accelerate or Fabric, compiled, sharded.
        every_n_steps: Optimizer steps between two measurements.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        log: A function of values and step, an Accelerator, Fabric, a run of W&B, Trackio or SwanLab, or a
            SummaryWriter, used on every rank; ``None``: nothing is logged. Pictures go to all but a function.
        metrics: Names from the catalogue, which :class:`~matent_callbacks.EntropyMonitor` describes: ``matrix_entropy``
            (nats), ``effective_rank``, ``spectrum``, ``rankme``, ``embedding_effective_rank`` and more. With
            ``reference`` also ``drift``, ``subspace_overlap`` and ``token_cosine``: what moved since then.
        probe: One batch (a mapping of the model's keyword arguments, or a tensor) or a list of them, which is read
            in evaluation mode in place of the training forwards; or a mapping of probes, ``<probe>/<metric>/<layer>``.
        max_tokens: Upper bound on the tokens, without padding, that one reading accumulates per layer.
        embedding: Which vector stands for a sequence: the ``"mean"``, the ``"last"`` or the ``"first"`` of the tokens
            that count. A layer whose output is ``(B, d)``, such as a pooler, provides these vectors itself.
        exclude_sinks: Leave out attention sinks, as :class:`~matent_callbacks.EntropyMonitor` does.
        tokens: ``"all"``, or ``"labels"``: only those that count in the loss.
        on_error: ``"warn"``: an error in monitoring is warned about once, and training goes on; ``"raise"``.
        reference: For Diff-eRank and ``drift``, measured on the probe: ``"start"``, or a model with the same layers.
        reference_dir: Folder for the hidden states of ``"start"``, which :meth:`state_dict` does not have and a resumed
            run needs for ``drift``. ``None``: they are not saved.
        drift_tokens: How many tokens of the probe are compared with the reference at most. Their hidden states in the
            reference are kept on the host: 2,048 tokens of 33 layers with d = 4,096 take 0.55 GB in bfloat16.
        mask: Function from a batch, also one of the probe, to its mask ``(B, T)``, which overrides the model's own.
        module: Path of the part of the model whose layers these are; ``None``: the language model, or the encoder.
        layer_offset: If ``model`` is a pipeline stage, the number of blocks in the stages before it.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``.
        solver: ``"exact"``: from all eigenvalues. ``"auto"``: layers of d = 1,024 and more (and as many tokens) are
            estimated to 0.2 % from a few matrix products, with the standard error ``matrix_entropy_error/<layer>``.
            Warnings say once which layers these are, and what is exact all the same. ``"approximate"``: as ``"auto"``.
        background: Decompose in a thread, on the CPU; the values are logged at the next measurement, or at the end.
        name: Prefix of the names of all values, for a second monitor with the same layers.
        window_steps: Optimizer steps that a measurement covers, up to the one that is due: for metrics of sequences.
        pictures: With two layers or more, log the profile through the layers and heat maps (needs matplotlib).
        charts: ``"few"``: with more than 6 layers, W&B draws charts of three and has the values of all; ``"all"``.
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
        reference_dir: str | os.PathLike[str] | None = None,
        drift_tokens: int = 2048,
        mask: Callable[[Any], Tensor | None] | None = None,
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
        self._model = model
        self._run_begins: dict[str, Any] = {"around": getattr(log, "autocast", nullcontext), "directory": reference_dir}
        self._run = RunMonitor(self.guard, every_n_steps, on_error=on_error, **measured_arguments(given))
        self._log = LoopLog(log, self._run, self.guard)
        # Where accelerate, Fabric and models have their device meshes.
        owner = SimpleNamespace(accelerator=log, strategy=getattr(log, "strategy", None), model=model)
        self._run.watch(model, owner=owner)
        self._began = self._resumed = self._under_way = False
        self._last = self._done = 0
        self._inside: tuple[Any, ...] = ()  # the batch of the step that is under way

    @contextmanager
    def step(self, step: int, *, batch: Any = None, ends: bool = False) -> Iterator[None]:
        """Read the forwards with gradients inside, if the step is due.

        Args:
            step: The number of the optimizer step that the forwards are of, from 0 or 1 on; numbers may be left out.
            batch: What the argument ``mask`` is called with.
            ends: The step ends with this block. With accelerate, pass ``accelerator.sync_gradients``.
        """
        self._begin_step(step)
        self._begin_batch(batch)
        self._inside = (batch,)
        try:
            yield
        except BaseException:
            self._end_batch(discard=True)
            raise
        finally:
            self._inside = ()
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
        if not self._inside:
            self._end_step()
        self._begin_evaluation()
        try:
            yield values
        finally:
            self._end_batch()
        found = self.guard.values("the values of an evaluation", lambda: self._run.evaluation_ends(self._model))
        values.update({f"{prefix}_{key}": value for key, value in found.items()})
        self._log.values({self._last: values})
        if self._inside:
            self._begin_batch(*self._inside)

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
        return self.guard.values("its state in the checkpoint", self._run.state_dict)

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
            self._log.values(self._run.run_ends(self._model, at=self._last))
            self._log.pictures(self._last, last=True)

    def __enter__(self) -> LoopMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        # After an error the other ranks may be anywhere: nothing is exchanged with them.
        if kind is None:
            self.close()

    @guarded
    def _begin_step(self, step: int) -> None:
        if not self._began:
            self._began, self._done = True, step - 1
            resumed = self._resumed or step > 1
            self._run.run_begins(self._model, step=self._done, resumed=resumed, **self._run_begins)
            self._run.save_reference()
        elif step != self._last:
            self._end_step()
            self._done = min(self._last, step - 1)
        self._last, self._under_way = step, True

    @guarded
    def _begin_batch(self, batch: Any) -> None:
        completes = self._last - self._done
        self._run.batch_begins(self._model, batch, step=self._done, completes=completes, training_only=True)

    @guarded
    def _end_batch(self, *, discard: bool = False) -> None:
        self._run.batch_ends()
        if discard:
            self._run.discard_step()

    @guarded
    def _end_step(self) -> None:
        if self._under_way:
            self._under_way = False
            self._log.values(self._run.step_ends(self._model, self._last, at=self._last) or {})

    @guarded
    def _begin_evaluation(self) -> None:
        self._run.evaluation_begins()
        if self._run.mask is None:
            self._run.evaluation_batch_begins(self._model)
