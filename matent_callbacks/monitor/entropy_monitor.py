"""The framework-neutral monitor: hidden states of chosen layers in, named numbers out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matent_callbacks.accumulate.catalogue import (
    Embedding,
    Solver,
    check_embedding,
    check_metrics,
    check_solver,
    sources_of,
)
from matent_callbacks.accumulate.layer_statistics import OF_WHOLE_SEQUENCES, LayerAccumulator
from matent_callbacks.accumulate.reduction import check_groups
from matent_callbacks.capture.batches import check_batch
from matent_callbacks.capture.forward import Seen
from matent_callbacks.capture.hooks import Capture
from matent_callbacks.capture.inference import device_of, quiet, run, to_device
from matent_callbacks.capture.layers import LayerSpec, resolve_layers
from matent_callbacks.monitor.decomposition import NONFINITE
from matent_callbacks.monitor.explanations import (
    counted_padding,
    left_out_sinks,
    undefined_by_cause,
    why_undefined,
)
from matent_callbacks.monitor.joint_reading import JointReading
from matent_callbacks.monitor.readings import PendingReadings, Readings
from matent_callbacks.monitor.remembered import Remembered
from matent_callbacks.monitor.solvers import background


class EntropyMonitor:
    """Measures the hidden states of a model while it runs, layer by layer.

    Inside ``with monitor:`` every forward of the model is read as it happens: nothing is run twice except compiled
    modules (eagerly), no activation is kept after it, and the autograd graph is not touched. Generation does not count
    (a forward inside a ``generate`` of the model, or given a key-value cache that holds tokens), nor does recomputation
    by gradient checkpointing. Of a block or norm that runs several times in a forward the last call counts. In a
    distributed run ``compute`` combines the tokens of all ranks; every rank has to call it.

    Padding is left out by the model's attention mask or, if its length is not that of the hidden states, by the mask
    that is given to a module around them: that of the frames in a speech encoder, or the ``src_key_padding_mask`` of
    torch's own layers. Where none fits, all tokens count and a warning says so.

    Args:
        model: The model as it is trained: plain, or wrapped by DDP, FSDP, PEFT or ``torch.compile``.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        metrics: Names from the catalogue. From one covariance of all tokens, each centred by its sequence and scaled to
            unit length: ``matrix_entropy`` and ``renyi_2`` (nats), ``normalized_matrix_entropy`` (over log d),
            ``effective_rank``, ``participation_ratio``, ``stable_rank``, ``numerical_rank`` (dimensions),
            ``top_share``, ``alpha_req``, and ``spectrum``, which is logged as ``spectrum_top_1``, ``_2``, ``_4``, ...:
            the share of the variance in that many of the strongest directions. From the tokens as they are: ``rankme``.
            From each sequence, then averaged, as in the paper: ``sequence_matrix_entropy`` (nats),
            ``sequence_effective_rank``. From one vector per sequence (see ``embedding``), scaled to unit length and
            centred by the mean of all of them: ``embedding_matrix_entropy`` (nats), ``embedding_effective_rank``,
            ``embedding_participation_ratio``; from these vectors as they are: ``embedding_rankme``,
            ``embedding_alpha_req``. And ``holevo_information`` (nats): how much of the matrix entropy tells sequences
            apart; ``curvature`` (radians): how sharply a sequence turns from token to token, the mean over sequences;
            ``lidar`` (dimensions): in how many directions sequences differ by more than they vary within themselves.
        module: Path of the part of the model whose layers these are; ``None``: the language model, or the encoder of
            an encoder-decoder.
        layer_offset: If ``model`` is a pipeline stage, the number of blocks in the stages before it. Layers are then
            selected and named by their numbers in the whole model; ``None``: ``model`` is the whole model.
        max_tokens: Upper bound on the tokens that one reading accumulates per layer; the first ones count, and padding
            is none of them.
        embedding: Which vector stands for a sequence: the ``"mean"``, the ``"last"`` or the ``"first"`` of the tokens
            that count. A layer whose output is ``(B, d)``, such as a pooler or a projection, or has the
            ``sentence_embedding`` of sentence-transformers, provides these vectors itself.
        exclude_sinks: Leave out attention sinks: tokens of a layer that are longer than 4 times the geometric mean of
            their sequence, if they are few (:func:`.functional.sink_tokens`). In pretrained language models a layer's
            numbers would describe this one token. One warning says where they are. ``False``: they count.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``, whatever the model computes in.
        solver: ``"exact"``, or ``"approximate"``: from d = 1,024 on (or as many tokens, if they are fewer) the entropy
            is estimated without the eigenvalues, 6 times as fast or more and off by less than 1 %; its standard error
            is ``matrix_entropy_error/<layer>``. It supports ``matrix_entropy``, ``normalized_matrix_entropy``,
            ``effective_rank``, the first and the last also of embeddings, and means over sequences, which stay exact.
        on_error: ``"raise"``, or ``"warn"``: warn once per layer, leave that layer out, and go on.
        process_group: The ranks whose tokens belong together; ``None``: all. For a model that is spread over ranks,
            those that hold the same part of it. Ranks of one group have to read the same layers.
        context_group: The ranks that hold parts of the same sequences, as in context parallelism; all of them are in
            ``process_group``. They exchange one sum per sequence and layer in the middle of the forward, so all of them
            have to run it, and for the entropy of sequences one second moment each. Packed batches are refused.

    Raises:
        ValueError: If a layer, metric or module is not known (with near matches), an argument is out of range, or a
            group does not hold the ranks that it has to.
        TypeError: If a group is not a process group.

    Example:
        >>> import torch
        >>> from matent_callbacks import EntropyMonitor
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> monitor = EntropyMonitor(model, layers="all")
        >>> with monitor:
        ...     _ = model(torch.randn(4, 16, 8))
        >>> sorted(monitor.compute())  # doctest: +NORMALIZE_WHITESPACE
        ['effective_rank/last', 'effective_rank/layer_00', 'effective_rank/layer_01',
         'matrix_entropy/last', 'matrix_entropy/layer_00', 'matrix_entropy/layer_01']
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = "last",
        *,
        metrics: str | Iterable[str] = ("matrix_entropy", "effective_rank"),
        module: str | None = None,
        layer_offset: int | None = None,
        max_tokens: int | None = None,
        embedding: Embedding = "mean",
        exclude_sinks: bool = True,
        dtype: torch.dtype = torch.float32,
        solver: Solver = "exact",
        on_error: Literal["raise", "warn"] = "raise",
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"`max_tokens` must be at least 2 or None, got {max_tokens}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"`on_error` must be 'raise' or 'warn', got {on_error!r}.")
        self.model = model
        self._parts = list(model.modules())
        self.metrics = check_metrics(metrics)
        check_solver(solver, self.metrics)
        self._embedding = check_embedding(embedding)
        self._exclude_sinks = exclude_sinks
        self._solver = solver
        self._max_tokens = max_tokens
        self._dtype = dtype
        self._on_error = on_error
        check_groups(process_group, context_group)
        whole = [name for name in self.metrics if sources_of([name]) & OF_WHOLE_SEQUENCES]
        if whole and context_group is not None:
            raise ValueError(
                f"`metrics` asks for {whole[0]!r}, which is of whole sequences, and there is a `context_group`."
            )
        self._process_group = process_group
        self._joint = JointReading(process_group, context_group)
        self._layers = resolve_layers(model, layers, module=module, layer_offset=layer_offset)
        self._capture = Capture(
            model,
            self._layers,
            self._record,
            self._guarded,
            discard=self._discard,
            whole_sequences=self._joint.has_whole_sequences,
        )
        self._failed: set[str] = set()
        self._unmasked: set[str] = set()
        self.remembered = Remembered()
        self.reset()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are read, as they stand in the keys."""
        return tuple(point.key for point in self._layers.points)

    @property
    def runnable(self) -> tuple[nn.Module, ...]:
        """What :meth:`read` may run a batch through, from the model as it is trained down to the one inside."""
        return self._layers.runnable

    def __enter__(self) -> EntropyMonitor:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(
        self,
        *,
        training_only: bool = False,
        same_adapters: bool = False,
        attention_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
    ) -> None:
        """Start reading forwards, for where a ``with monitor:`` block cannot be used.

        Args:
            training_only: Leave out forwards that are not in training mode with gradients.
            same_adapters: Leave out forwards with other PEFT adapters active than now, such as those of a reference
                model that is the policy with its adapter disabled.
            attention_mask: ``(B, T)``, for models that are not given one; it overrides the model's own.
            sample_mask: ``(B,)``, false for samples that do not count, such as the padding samples that a distributed
                sampler repeats.
        """
        self._capture.open(
            training_only=training_only,
            same_adapters=same_adapters,
            attention_mask=attention_mask,
            sample_mask=sample_mask,
        )
        self._joint.begin(self._accumulators, self._failed)

    def stop(self) -> None:
        """Stop reading and remove every hook."""
        self._capture.close()

    def read(self, batches: Any, *, attention_mask: Tensor | Callable[[Any], Tensor | None] | None = None) -> None:
        """Read batches in side-effect-free inference: evaluation mode, no gradients, no trace left.

        They are run through the model as it is trained, with PEFT and without DDP, FSDP and ``torch.compile``. Where
        its own ``forward`` does not take them, as that of a LightningModule may not, they are run through the first
        module on the way to the Hugging Face model inside whose ``forward`` does, or else through that model. If a
        forward fails, all that was read since the last ``compute`` is discarded.

        Args:
            batches: One batch (a mapping of keyword arguments, or a tensor) or a list of batches.
            attention_mask: ``(B, T)``, for models that are not given one, or a function that returns it for a batch;
                it overrides the model's own. ``None``, also from the function: the model's own holds.

        Raises:
            ValueError: If there is no tensor in a batch, or its token ids are a list.
        """
        device = device_of(self.model)
        try:
            with quiet(self.model), self._capture.uncompiled():
                for batch in [batches] if isinstance(batches, Mapping | Tensor) else batches:
                    check_batch(batch)
                    mask = attention_mask(batch) if callable(attention_mask) else attention_mask
                    with self._capture.masked(to_device(mask, device)):
                        run(self.runnable, batch)
        except Exception:
            self.reset()
            self._capture.seen.broken_off = True
            raise

    def compute(self) -> dict[str, float]:
        """Compute the readings since the last call, as ``{"<metric>/<layer>": value}``, and reset.

        The names are the same each time: a number that is not defined is NaN, and one warning says why. Two kinds are
        missing until a layer was read: the names of ``spectrum``, and those of a layer that fails at its first
        reading. ``nonfinite_tokens/<layer>`` is added if tokens were left out
        because they held NaN or Inf. If ranks do not read the same layers, all is NaN, and a warning says what each of
        them reads. Another says where padding counts, since no mask fits a layer.
        """
        return self._begin(None)()

    def compute_later(self) -> Callable[[], dict[str, float]]:
        """Like :meth:`compute`, with the decompositions in a background thread, on the CPU, while the program goes on.

        Returns:
            A function that waits for them and returns what :meth:`compute` would have. In a distributed run every rank
            has to call it, at the same point.
        """
        return self._begin(background())

    def _begin(self, executor: Executor | None) -> Callable[[], dict[str, float]]:
        accumulators, seen = self._accumulators, self._capture.seen
        self.reset()
        pending = PendingReadings(
            accumulators,
            self.metrics,
            failed=self._failed,
            executor=executor,
            solver=self._solver,
            group=self._process_group,
        )
        return lambda: self._named(pending.result(), seen)

    def _named(self, readings: Readings, seen: Seen) -> dict[str, float]:
        if readings.unlike:
            for told in self.remembered.untold("unlike", [readings.unlike]):
                warnings.warn(told, stacklevel=3)
            return self.undefined()
        self._joint.failed |= readings.failed
        elsewhere = readings.failed - self._failed
        if elsewhere:
            self._failed |= elsewhere
            warnings.warn(
                f"Left out, since ranks failed to read them or differ in their width: {', '.join(sorted(elsewhere))}.",
                stacklevel=3,
            )
        with_sinks = self.remembered.untold("sinks", readings.sinks)
        if with_sinks:
            warnings.warn(left_out_sinks({layer: readings.sinks[layer] for layer in with_sinks}), stacklevel=3)
        for cause, undefined in undefined_by_cause(readings, seen).items():
            new = self.remembered.untold(cause, undefined)
            # What broke off was told with its own error.
            if new and not seen.broken_off:
                warnings.warn(why_undefined(cause, new, readings, seen, self._layers, self.model), stacklevel=3)
        for told in counted_padding({key: own for key, own in seen.unmasked.items() if key not in self._unmasked}):
            warnings.warn(told, stacklevel=3)
        self._unmasked |= set(seen.unmasked)
        bad = {f"{NONFINITE}/{layer}": float(count) for layer, count in readings.nonfinite.items() if count}
        return self.remembered.complete(readings.values) | bad

    def undefined(self) -> dict[str, float]:
        """Return NaN under each name that :meth:`compute` returned before, for where it fails."""
        return self.remembered.complete({})

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` is the one that this was made for, and no module in it has been replaced or added since."""
        return self.model is model and self._parts == list(model.modules())

    def reset(self) -> None:
        """Discard what was read since the last ``compute``."""
        self._capture.seen = Seen()
        device = device_of(self.model)
        sources = sources_of(self.metrics)
        self._accumulators = {
            layer: LayerAccumulator(
                sources,
                max_tokens=self._max_tokens,
                dtype=self._dtype,
                device=device,
                embedding=self._embedding,
                exclude_sinks=self._exclude_sinks,
            )
            for layer in self.layers
        }

    def _discard(self, layer: str) -> None:
        self._accumulators[layer].discard()

    def _record(
        self, layer: str, hidden_states: Tensor | None, attention_mask: Tensor | None, vectors: Tensor | None
    ) -> None:
        accumulator, failed = self._accumulators[layer], layer in self._failed
        self._joint.record(layer, accumulator, hidden_states, attention_mask, vectors, failed=failed)

    @contextmanager
    def _guarded(self, layer: str) -> Iterator[None]:
        self._joint.expect()
        try:
            yield
        except Exception as error:
            if layer in self._accumulators:
                self._joint.excuse(layer, self._accumulators[layer])
            message = f"Reading layer {layer!r} failed: {error}"
            if self._on_error == "raise":
                raise RuntimeError(message) from error
            failing = {layer} if layer in self.layers else set(self.layers)
            if not failing <= self._failed:
                warnings.warn(f"{message} It is left out from here on; training goes on.", stacklevel=2)
            self._failed |= failing
