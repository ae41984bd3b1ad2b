"""Diff-eRank: the effective ranks of a reference model on the probes, and what they depend on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from matent_callbacks.accumulate.gathering import all_gather_ragged
from matent_callbacks.accumulate.reduction import agreed_failures, is_distributed
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.capture.inference import adapters_around, without_adapters
from matent_callbacks.capture.probes import hashes

DATA_SET_RANK = "sequence_effective_rank"
"""The metric that Diff-eRank is a difference of."""
_SETTINGS = ("module", "layer_offset", "max_tokens", "exclude_sinks", "tokens")


def check_reference(reference: Any, probe: Any) -> None:
    """Raise ValueError if it is none of those that :class:`Reference` takes, or there is no probe for it."""
    if not (reference is None or reference == "start" or isinstance(reference, nn.Module)):
        raise ValueError(f"`reference` must be 'start', a model or None, got {reference!r}.")
    if reference is not None and probe is None:
        raise ValueError("`reference` needs a `probe`, the batch that both models are measured on; got None.")


class Reference:
    """The reference values of a run, measured when it begins or restored from a checkpoint.

    Args:
        given: ``"start"``, the model as it is when training begins; another model; or ``None``: there is no reference.
        probes: The probes by the prefix of the names of their values.
        settings: The arguments of the monitors.
        guard: That of the callback.
    """

    def __init__(
        self,
        given: Literal["start"] | nn.Module | None,
        probes: Mapping[str, Any],
        settings: Mapping[str, Any],
        guard: Guard,
    ) -> None:
        self.given = given
        self._probes = probes
        self._settings = {name: settings.get(name) for name in _SETTINGS}
        self._guard = guard
        self.differs: dict[str, str] = {}
        """Why what the checkpoint has is not of what is measured now, by the prefix of the probe."""
        self._ranks: dict[str, float] | None = None
        self._of: dict[str, Any] = {}

    def begin(
        self,
        model: nn.Module,
        layers: tuple[str, ...],
        measure: Callable[[nn.Module], dict[str, float]],
        *,
        resumed: bool,
        group: dist.ProcessGroup | None,
    ) -> bool:
        """Measure the reference, or find that of the start of the run in what was restored from the checkpoint.

        Returns:
            Whether it is that of the checkpoint.
        """
        if self.given is None:
            return False
        of_start = self.is_of_start(model)
        device = next(model.parameters()).device
        before, self._of = self._of, self._what_it_is_of(of_start, device, group)
        if is_distributed(group):
            # The ranks measure it together or not at all.
            resumed = agreed_failures([resumed], device, group)[0]
        if of_start and resumed:
            self._keep_what_holds(before, layers)
            return True
        adapted = None if of_start else adapters_around(self.given, model)
        reference = self.given if isinstance(self.given, nn.Module) and not (of_start or adapted) else model

        def measured() -> dict[str, float]:
            with nullcontext() if adapted is None else without_adapters(adapted):
                return measure(reference)

        self._ranks = self._guard.values("the reference", measured)
        return False

    def is_of_start(self, model: nn.Module) -> bool:
        """Whether it is the model as it is when training begins; the base of a PEFT model is not."""
        is_part = any(part is self.given for part in model.modules())
        return self.given == "start" or (is_part and adapters_around(self.given, model) is None)

    def difference(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return ``diff_erank`` of the values of a probe: the rank of the reference minus that of the model now."""
        return {
            key.replace(DATA_SET_RANK, "diff_erank"): before - values[key]
            for key, before in (self._ranks or {}).items()
            if key in values
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        return {"reference_ranks": self._ranks, "reference_of": self._of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; an invalid state leaves no reference."""
        self._ranks, self._of = {}, {}
        ranks = state["reference_ranks"]
        self._ranks = ranks if ranks is None else {str(key): float(value) for key, value in ranks.items()}
        self._of = dict(state["reference_of"])

    def _what_it_is_of(self, of_start: bool, device: torch.device, group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Return what the values of the reference depend on, as JSON types."""
        own: dict[str, list[int]] = {}
        with self._guard("the comparison of `probe` with that at the start"):
            own = {prefix: hashes(probe) for prefix, probe in self._probes.items()}
        probes: dict[str, str] = {}
        for prefix in self._probes:
            found = torch.tensor(own.get(prefix, []), dtype=torch.int64, device=device).reshape(-1, 1)
            # Ranks can have shares of it.
            everybodys = all_gather_ragged(found, group) if is_distributed(group) else [found]
            distinct = {number for part in everybodys for number in part.flatten().tolist()}
            probes[prefix] = " ".join(f"{number:x}" for number in sorted(distinct))
        return {"reference": "start" if of_start else "model", "probes": probes, "settings": self._settings}

    def _keep_what_holds(self, before: dict[str, Any], layers: tuple[str, ...]) -> None:
        """Leave out values from the checkpoint that are not of what is measured now, with one warning."""
        now, saved = self._of, self._ranks or {}
        changed = [name for name in ("reference", "settings") if before.get(name) != now[name]]
        probes_before = before.get("probes", {})
        others = [p for p, found in now["probes"].items() if probes_before.get(p) != found or not found]
        kept = tuple(f"{p}{DATA_SET_RANK}/" for p in self._probes if not changed and p not in others)
        self._ranks = {key: value for key, value in saved.items() if key.startswith(kept)}
        wanted = [f"{p}{DATA_SET_RANK}/{layer}" for p in self._probes for layer in layers]
        what = f"`{changed[0]}`" if changed else "`probe`"
        self.differs = {
            prefix: f"the hidden states of the reference are of another {what}"
            for prefix in self._probes
            if changed or prefix in others
        }
        missing = [key.replace(DATA_SET_RANK, "diff_erank") for key in wanted if key not in self._ranks]
        if not missing:
            return
        if not saved:
            reason = "the checkpoint has no reference values of this callback"
        elif "settings" in changed:
            names = ", ".join(f"`{name}`" for name in _SETTINGS)
            reason = f"the reference values in the checkpoint are of another {names}"
        elif changed:
            reason = "the reference values in the checkpoint are of another `reference`"
        elif others:
            reason = "the reference values in the checkpoint are of another `probe`"
        else:
            reason = "these layers have no reference values in the checkpoint"
        warnings.warn(
            f"Training was resumed without {', '.join(missing)}: {reason}, and what is measured now is not the start.",
            stacklevel=4,
        )
