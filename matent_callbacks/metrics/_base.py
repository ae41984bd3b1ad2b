"""Base classes of the metrics: their arguments and input checks, and how torchmetrics merges their states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from matent_callbacks.accumulate.sequences import log_norms_in_pieces
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional._tokens import check_hidden_states
from matent_callbacks.functional.entropy import check_alpha
from matent_callbacks.functional.sinks import token_norms

NORMALIZE_BY = (None, "log_d", "log_rank")


class MergedMetric(Metric):
    """A metric whose states can only be merged together, such as a count, a mean and a scatter matrix."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0

    _counters: tuple[str, ...]
    """Names of the states that are integers."""
    _state_type: Any
    """A named tuple whose fields are the states, under the same names."""

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or a list of values over steps.

        Args:
            val: One result of ``forward`` or ``compute``, or a list of them. By default that of ``compute``.
            ax: A matplotlib axis to draw on.

        Returns:
            Figure and axis.
        """
        return self._plot(val, ax)

    def _add_states(self, empty: Any) -> None:
        for name, state in empty._asdict().items():
            self.add_state(name, state, dist_reduce_fx=None)

    @property
    def _state(self) -> Any:
        return self._state_type(*(getattr(self, name) for name in self._state_type._fields))

    @_state.setter
    def _state(self, value: Any) -> None:
        for name, state in value._asdict().items():
            setattr(self, name, state)

    def _merge(self, incoming: dict[str, Tensor]) -> None:
        self._join(self._state_type(*(incoming[name].to(self.device) for name in self._state_type._fields)))

    def _join(self, other: Any) -> None:
        raise NotImplementedError

    def _all_reduce(self, group: Any) -> None:
        raise NotImplementedError

    # torchmetrics reduces one state at a time, but a mean and a scatter can only be merged together. So the methods in
    # which it does that are overridden: this one, for `forward` and `merge_state`, and the next, for distributed runs.

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        missing = [name for name in self._defaults if name not in incoming_state]
        if missing:
            raise ValueError(f"`incoming_state` must hold the states {list(self._defaults)}, {missing} are missing.")
        self._merge(incoming_state)

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        if dist_sync_fn is not gather_all_tensors:
            self._sync_gathered(dist_sync_fn, process_group or self.process_group)
            return
        self._all_reduce(process_group or self.process_group)

    def _sync_gathered(self, gather: Any, group: Any) -> None:
        """Gather the states with the user's own function, and merge them rank by rank."""
        gathered = {name: _gathered(gather, getattr(self, name), group) for name in self._defaults}
        ranks = [dict(zip(gathered, states, strict=True)) for states in zip(*gathered.values(), strict=True)]
        for name, state in ranks[0].items():
            setattr(self, name, state)
        for state in ranks[1:]:
            self._merge(state)

    def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
        this: Any = super()._apply(fn, exclude_state)
        # `set_dtype` casts every state, but counts have to stay integers.
        for name in self._counters:
            this._defaults[name] = this._defaults[name].to(torch.int64)
            setattr(this, name, getattr(this, name).to(torch.int64))
        return this


def _gathered(gather: Any, state: Tensor, group: Any) -> list[Tensor]:
    if state.ndim == 0:
        return list(gather(state, group=group))
    # With one extra row: torchmetrics pads states if ranks differ in shape, and torch before 2.7 cannot pad empty ones.
    return [padded[:-1] for padded in gather(torch.cat([state, state.new_zeros(1, *state.shape[1:])]), group=group)]


class TokenMetric(MergedMetric):
    """A metric over the tokens of one layer."""

    settings: Tensor

    def __init__(
        self,
        *,
        center_sequences: bool,
        normalize: bool,
        alpha: float,
        dtype: torch.dtype,
        num_features: int | None,
        exclude_sinks: bool,
        settings: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        check_alpha(alpha)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        if num_features is not None and num_features < 1:
            raise ValueError(f"`num_features` must be at least 1 or None, got {num_features}.")
        super().__init__(**kwargs)
        self.normalize = normalize
        self.alpha = alpha
        self.num_features = num_features
        self.exclude_sinks = exclude_sinks
        # A state, because a `MetricCollection` updates only one of the metrics whose states are equal after the first
        # batch. Metrics with other settings must not have equal states.
        signature = torch.tensor(
            [center_sequences, normalize, dtype == torch.float64, exclude_sinks, *settings], dtype=torch.int64
        )
        self.add_state("settings", signature, dist_reduce_fx=None)

    def update(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            hidden_states: ``(N, d)``, one sequence, or ``(B, T, d)``.
            attention_mask: ``(N,)`` or ``(B, T)``; a token counts where it is greater than 0. ``None``: all count.

        Raises:
            TypeError: If ``hidden_states`` is not a floating point tensor.
            ValueError: If a shape is wrong, or d is not that of the updates before.
        """
        states, mask = self._check(hidden_states, attention_mask)
        states = states.detach()
        with full_precision(states.device):
            if self.exclude_sinks and mask.numel():
                mask = mask & ~token_norms(log_norms_in_pieces(states, self._state_dtype), mask).sinks
            self._accumulate(states, mask)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add tokens and return the value of this batch alone."""
        # torchmetrics resets the state before it calls `update`: an error in there would lose what was accumulated.
        self._check(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same class and settings has accumulated.

        Raises:
            ValueError: If class, settings or d differ.
        """
        theirs = incoming_state.get("settings") if isinstance(incoming_state, dict) else incoming_state.settings
        if isinstance(theirs, Tensor) and not torch.equal(theirs.cpu(), self.settings.cpu()):
            raise ValueError(
                f"`incoming_state` was accumulated with other settings of {type(self).__name__} (center, normalize, "
                "dtype, ...) than this metric's."
            )
        super().merge_state(incoming_state)

    @property
    def _state_dtype(self) -> torch.dtype:
        raise NotImplementedError

    def _known_features(self) -> int | None:
        raise NotImplementedError

    def _accumulate(self, states: Tensor, mask: Tensor) -> None:
        raise NotImplementedError

    def _check(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checked = check_hidden_states(hidden_states, attention_mask)
        known = self._known_features()
        if known is not None and hidden_states.shape[-1] != known:
            raise ValueError(
                f"`hidden_states` must have {known} features as in the updates before (or as `num_features` says), "
                f"got {hidden_states.shape[-1]}."
            )
        return checked
