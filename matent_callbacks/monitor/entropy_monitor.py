"""The framework-neutral monitor: hidden states of chosen layers in, named numbers out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
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
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator, check_split
from matent_callbacks.accumulate.probe_tokens import ProbeTokens
from matent_callbacks.accumulate.reduction import check_groups
from matent_callbacks.capture.batches import check_batch
from matent_callbacks.capture.events import Events
from matent_callbacks.capture.forward import Seen
from matent_callbacks.capture.hooks import Capture
from matent_callbacks.capture.inference import device_of, run, side_effect_free, to_device
from matent_callbacks.capture.layers import LayerSpec, resolve_layers
from matent_callbacks.capture.values import all_modules
from matent_callbacks.monitor.comparison import Comparison
from matent_callbacks.monitor.decomposition import NONFINITE
from matent_callbacks.monitor.explanations import messages
from matent_callbacks.monitor.readings import PendingReadings, Readings
from matent_callbacks.monitor.recording import Recording
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

    What ``metrics`` asks for; of all tokens, each centred by the mean of its sequence and scaled to unit length, where
    nothing else is said:

    =======================================  ==========  ===============================================================
    ``matrix_entropy``                       nats        entropy of the spectrum of one covariance of all tokens
    ``normalized_matrix_entropy``            -           the same over log d
    ``effective_rank``                       dimensions  exp of the matrix entropy
    ``sequence_matrix_entropy``              nats        entropy of each sequence, then their mean, as in the paper
    ``sequence_effective_rank``              dimensions  exp of that mean
    ``renyi_2``                              nats        entropy of order 2
    ``rankme``                               dimensions  RankMe, of the tokens as they are
    ``participation_ratio``                  dimensions  1 / sum of the squared shares of the spectrum
    ``stable_rank``                          dimensions  1 / largest share
    ``numerical_rank``                       dimensions  eigenvalues above rounding
    ``top_share``                            share       variance in the strongest direction
    ``top_dimension_share``                  share       variance in the largest dimension, an outlier
    ``correlation_effective_rank``           dimensions  of the correlations: no dimension outweighs the others
    ``spectrum``                             share       ``spectrum_top_1``, ``_2``, ``_4``, ...: variance in so many
    ``alpha_req``                            -           slope of the log of the spectrum
    ``embedding_matrix_entropy``             nats        as above, of one vector per sequence, see ``embedding``
    ``embedding_effective_rank``             dimensions  exp of that
    ``embedding_rankme``                     dimensions  RankMe of these vectors as they are
    ``embedding_participation_ratio``        dimensions  as above, of these vectors at unit length
    ``embedding_alpha_req``                  -           as above, of these vectors as they are
    ``embedding_covariance_effective_rank``  dimensions  of these vectors as they are, about their mean
    ``embedding_covariance_alpha_req``       -           the same
    ``holevo_information``                   nats        how much of the matrix entropy tells sequences apart
    ``curvature``                            radians     how sharply a sequence turns from token to token
    ``lidar``                                dimensions  directions in which sequences differ beyond what is within them
    ``token_norm``                           -           length of the tokens as they are, root mean square
    ``max_norm_ratio``                       -           longest token over the geometric mean of its sequence
    ``sink_tokens``                          tokens      attention sinks a sequence, see ``exclude_sinks``
    ``anisotropy``                           -           mean cosine between two tokens as they are
    =======================================  ==========  ===============================================================

    Args:
        model: The model as it is trained: plain, or wrapped by DDP, FSDP, PEFT or ``torch.compile``.
        layers: What to read, numbered as ``output_hidden_states`` does: ``"last"`` (after the final norm), ``"all"``
            (embeddings, every block but the last, ``last``), ints (0: embeddings; negative allowed), ``"every:4"``,
            module names or globs (``"*.mlp"``), or a list of these.
        metrics: Names from the table of :class:`~matent_callbacks.EntropyMonitor`, one or several.
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
            their sequence, if they are few, see :func:`~matent_callbacks.functional.sink_tokens`. In pretrained
            language models a layer's numbers would describe this one token. One warning says where they are.
            ``False``: they count.
        tokens: ``"all"``, or ``"labels"``: only those that count in the loss, such as the response in supervised
            fine-tuning. These have a label other than -100 in the ``labels`` ``(B, T)`` that the model's ``forward`` is
            given: the label at place t counts the token at place t, as the models of transformers take them, so it is
            the tokens of the response, not the places that predict them. The attention mask applies as well. In an
            encoder-decoder labels are of the decoder: ``module="decoder"``, where place t predicts label t. Where
            labels are missing or have another shape than the hidden states, numbers are NaN, and one warning says why.
        dtype: Of the statistics, ``torch.float32`` or ``torch.float64``, whatever the model computes in.
        solver: ``"exact"``: from all eigenvalues. ``"auto"``: layers of d = 1,024 and more (and as many tokens) are
            estimated to 0.2 % from a few matrix products, 5 times as fast at d = 2,048 and 11 times at 4,096, with the
            standard error of the entropy as ``matrix_entropy_error/<layer>``. Warnings say once which layers that is,
            and which metrics still take all eigenvalues. ``"approximate"`` is the same as ``"auto"``.
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
        tokens: Literal["all", "labels"] = "all",
        dtype: torch.dtype = torch.float32,
        solver: Solver = "exact",
        on_error: Literal["raise", "warn"] = "raise",
        process_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self._parts = all_modules(model)
        self.metrics = check_metrics(
            metrics, no_reference="the callbacks and LoopMonitor take it, with `reference` and `probe`"
        )
        check_solver(solver)
        self._embedding = check_embedding(embedding)
        self._exclude_sinks = exclude_sinks
        if tokens not in ("all", "labels"):
            raise ValueError(f"`tokens` must be 'all' or 'labels', got {tokens!r}.")
        self._solver = solver
        self._max_tokens = max_tokens
        self._dtype = dtype
        check_groups(process_group, context_group)
        if context_group is not None:
            check_split(self.metrics)
        self._process_group = process_group
        self._comparison: Comparison | None = None
        self._layers = resolve_layers(model, layers, module=module, layer_offset=layer_offset)
        self._recording = Recording(self._empty(), on_error, process_group, context_group)
        events = Events(
            model,
            self._layers,
            self._recording.record,
            self._recording.guarded,
            discard=self._recording.discard,
            whole_sequences=self._recording.has_whole_sequences,
            only_in_loss=tokens == "labels",
        )
        self._capture = Capture(events)
        self.remembered = Remembered()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are read, as they stand in the keys."""
        return tuple(point.key for point in self._layers.points)

    @property
    def runnable(self) -> tuple[nn.Module, ...]:
        """What :meth:`read` may run a batch through, from the model as it is trained down to the one inside."""
        return self._layers.runnable

    @property
    def failed(self) -> frozenset[str]:
        """Layers that are left out, since they could not be read: after a reading those of all ranks."""
        return frozenset(self._recording.failed)

    @property
    def probe_tokens(self) -> dict[str, ProbeTokens]:
        """What was kept, since the last reading, of the tokens that are compared with a reference."""
        found = ((layer, own.probe_tokens) for layer, own in self._recording.accumulators.items())
        return {layer: tokens for layer, tokens in found if tokens is not None}

    def compare(self, comparison: Comparison | None) -> None:
        """Compare what :meth:`read` reads from now on with a reference, as far as it has one; ``None``: do not."""
        self._comparison = comparison
        self.reset()

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
        batch_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Start reading forwards, for where a ``with monitor:`` block cannot be used.

        Args:
            training_only: Leave out forwards without gradients.
            same_adapters: Leave out forwards with other PEFT adapters active than now, such as those of a reference
                model that is the policy with its adapter disabled.
            attention_mask: ``(B, T)``, for models that are not given one; it overrides the model's own.
            batch_mask: ``(B, T)``, that of the batch, which is used if the model is not given any.
            sample_mask: ``(B,)``, false for samples that do not count, such as the padding samples that a distributed
                sampler repeats.
            labels: ``(B, T)``: for ``tokens="labels"``, where the model is not given labels, since the loss is computed
                outside of it. Labels that a module is given, and that fit, come first.
        """
        self._capture.open(
            training_only=training_only,
            same_adapters=same_adapters,
            attention_mask=attention_mask,
            batch_mask=batch_mask,
            sample_mask=sample_mask,
            labels=labels,
        )
        self._recording.begin()

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
            with side_effect_free(self.model), self._capture.uncompiled():
                for number, batch in enumerate([batches] if isinstance(batches, Mapping | Tensor) else batches):
                    if self._comparison is not None:
                        self._comparison.batch = number
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
        missing until a layer was read: the names of ``spectrum``, and those of a layer that fails at its first reading.
        ``nonfinite_tokens/<layer>`` is added if tokens were left out because they held NaN or Inf. If ranks do not read
        the same layers, all is NaN, and a warning says what each of them reads. Another says where padding counts,
        since no mask fits a layer.
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
        accumulators, seen = self._recording.accumulators, self._capture.seen
        self.reset()
        failed, group = self._recording.failed, self._process_group
        pending = PendingReadings(
            accumulators,
            self.metrics,
            failed=failed,
            executor=executor,
            solver=self._solver,
            group=group,
            comparison=self._comparison,
        )
        return lambda: self._named(pending.result(), seen)

    def _named(self, readings: Readings, seen: Seen) -> dict[str, float]:
        elsewhere = self._recording.fail(readings.failed) if not readings.unlike else set[str]()
        for message in messages(readings, seen, self.remembered, self._layers, self.model, failed_elsewhere=elsewhere):
            warnings.warn(message, stacklevel=3)
        if readings.unlike:
            return self.undefined()
        bad = {f"{NONFINITE}/{layer}": float(count) for layer, count in readings.nonfinite.items() if count}
        return self.remembered.complete(readings.values) | bad

    def undefined(self) -> dict[str, float]:
        """Return NaN under each name that :meth:`compute` returned before, for where it fails."""
        return self.remembered.complete({})

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` is the one that this was made for, and no module in it has been replaced or added since."""
        return self.model is model and self._parts == all_modules(model)

    def reset(self) -> None:
        """Discard what was read since the last ``compute``."""
        self._capture.forget_seen()
        self._recording.accumulators = self._empty()

    def _empty(self) -> dict[str, LayerAccumulator]:
        empty = LayerAccumulator(
            sources_of(self.metrics),
            max_tokens=self._max_tokens,
            dtype=self._dtype,
            device=device_of(self.model),
            embedding=self._embedding,
            exclude_sinks=self._exclude_sinks,
        )
        accumulators = {layer: empty.empty() for layer in self.layers}
        if self._comparison is not None:
            for layer, accumulator in accumulators.items():
                accumulator.probe_tokens = self._comparison.tokens(layer)
        return accumulators
