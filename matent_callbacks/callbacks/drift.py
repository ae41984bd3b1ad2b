"""What the callbacks compare with the reference, the tokens of each probe, and the files that keep the reference."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matent_callbacks._files import write_atomically
from matent_callbacks.accumulate.probe_tokens import ProbeTokens, ReferenceTokens
from matent_callbacks.accumulate.reduction import AllOrNone, agreed_failures, all_reduce_sum, is_distributed
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.capture.inference import device_of
from matent_callbacks.capture.probes import fingerprint
from matent_callbacks.monitor import EntropyMonitor
from matent_callbacks.monitor.comparison import Comparison

_FOLDER = "matent_reference"


def check_drift_tokens(drift_tokens: Any) -> int:
    """Return ``drift_tokens``, or raise ValueError unless it is a whole number of at least 4."""
    if isinstance(drift_tokens, bool) or not isinstance(drift_tokens, int) or drift_tokens < 4:
        raise ValueError(f"`drift_tokens` must be a whole number of at least 4, got {drift_tokens!r}.")
    return drift_tokens


class Drift:
    """The comparisons of a run, one for each probe, and where the reference of the start of the run is kept.

    The hidden states are too many for a checkpoint's state. So each rank writes the layers that it holds into files of
    their own, one a layer, named by a hash of what is in them. The checkpoint has these names, so that a run that is
    resumed on another number of ranks finds them, and does not take those of another run in the same folder.

    Args:
        metrics: Which names of :data:`.COMPARISONS` are asked for.
        most: How many tokens are compared at most.
        guard: That of the callback.
    """

    def __init__(self, metrics: Sequence[str], most: int, guard: Guard) -> None:
        self.metrics = tuple(metrics)
        self.most = most
        self.comparisons: dict[str, Comparison] = {}
        """Those that have a reference, by the prefix of the probe."""
        self._guard = guard
        self._directory: Path | None = None
        self._is_of_start = False
        self._is_saved = False
        self._state: dict[str, Any] = {}

    def begin(self, directory: str | os.PathLike[str] | None, *, of_start: bool) -> None:
        """Forget the reference of the run before; that of the start of a run is saved in ``directory``."""
        self.comparisons = {}
        self._directory = None if directory is None else Path(directory).absolute() / _FOLDER
        self._is_of_start, self._is_saved = of_start, False

    def keep(
        self, prefix: str, comparison: Comparison, kept: Mapping[str, ProbeTokens], monitor: EntropyMonitor
    ) -> None:
        """Keep what a monitor read of a probe as its reference. Every rank has to call it."""
        device = device_of(monitor.model)
        self._state.pop(prefix, None)
        with self._guard("the comparison with the reference"):
            comparison.keep(kept, monitor.failed, device)
            self.comparisons[prefix] = comparison
            if self._is_of_start:
                self._state[prefix] = self._described(comparison, device)

    def order_of(self, prefix: str) -> list[int]:
        """Return in which order the batches of a probe were numbered, from the checkpoint; empty if it is not there."""
        return list(self._state.get(prefix, {}).get("order", ()))

    def restore(
        self,
        comparisons: Mapping[str, Comparison],
        layers: Sequence[str],
        differs: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """Read the reference from its files, and leave out what is not there with one warning. All ranks call it.

        Args:
            comparisons: By the prefix of the probe, with the tokens chosen.
            layers: All that are measured.
            differs: Why what the checkpoint has is not of what is measured now, by the prefix of the probe.
            device: For what ranks exchange.
        """
        missing: dict[str, list[str]] = defaultdict(list)
        for prefix, comparison in comparisons.items():
            saved = self._state.pop(prefix, {})
            reason = differs.get(prefix) or self._differs(saved, comparison)
            found: dict[str, ReferenceTokens | None] = {}
            for layer in layers if not reason else ():
                with self._guard("the files of the reference"):
                    found[layer] = self._read(saved, layer, comparison)
            lost = [not found.get(layer) and (bool(reason) or comparison.owns(layer)) for layer in layers]
            if is_distributed(comparison.group):
                lost = agreed_failures(lost, device, comparison.group)
            kept = [layer for layer, is_lost in zip(layers, lost, strict=True) if not is_lost]
            if kept:
                own = {layer: tokens for layer in kept if (tokens := found.get(layer)) is not None}
                comparison.restore(own, kept, device)
                self.comparisons[prefix] = comparison
                digests = {layer: saved["layers"][layer] for layer in kept}
                self._state[prefix] = {**saved, "layers": digests, "directory": self._named()}
            if len(kept) < len(layers):
                where = f"of {', '.join(layer for layer in layers if layer not in kept)}" if kept else ""
                names = [f"{prefix}{name} {where}".strip() for name in self.metrics]
                missing[reason or self._why_gone(saved)] += names
        for reason, names in missing.items():
            warnings.warn(
                f"Training was resumed without {', '.join(names)}: {reason}, and what is measured now is not the "
                "start.",
                stacklevel=4,
            )

    def save(self) -> None:
        """Write the layers that this rank holds, once; nothing is exchanged with other ranks."""
        if self._directory is None or self._is_saved or not self._is_of_start:
            return
        with self._guard("the files of the reference, without which a resumed run has no drift") as writing:
            for prefix, saved in self._state.items():
                for layer, tokens in self.comparisons[prefix].reference.items():
                    _write(self._directory / _name(saved["layers"][layer]), tokens)
        self._is_saved = not writing.failed

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types; empty where nothing is compared with the start."""
        return {"reference_tokens": self._state} if self.metrics else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._state = {}
        self._state = {str(prefix): dict(own) for prefix, own in state.get("reference_tokens", {}).items()}

    def _described(self, comparison: Comparison, device: torch.device) -> dict[str, Any]:
        digests = torch.zeros(len(comparison.layers), dtype=torch.int64)
        groups = [comparison.group] if is_distributed(comparison.group) else []
        with AllOrNone(device, groups):
            for row, layer in enumerate(comparison.layers):
                if layer in comparison.reference:
                    digests[row] = fingerprint(comparison.reference[layer]._asdict())
        if groups:
            digests = all_reduce_sum(digests.to(device), comparison.group)
        return {
            "order": comparison.order,
            "most": self.most,
            "split_over": comparison.split_over,
            "layers": dict(zip(comparison.layers, digests.tolist(), strict=True)),
            "directory": self._named(),
        }

    def _differs(self, saved: Mapping[str, Any], comparison: Comparison) -> str:
        if not saved:
            return "the checkpoint has no hidden states of the reference for this callback"
        if saved["most"] != self.most:
            return "the hidden states of the reference are of another `drift_tokens`"
        if saved["split_over"] != comparison.split_over:
            return "the hidden states of the reference are of another number of ranks that share sequences"
        return ""

    def _read(self, saved: Mapping[str, Any], layer: str, comparison: Comparison) -> ReferenceTokens | None:
        """Return what this rank is to hold of a layer, if it is there."""
        digest = saved["layers"].get(layer)
        if digest is None or layer not in (comparison.places or {}) or not comparison.owns(layer):
            return None
        for directory in (self._directory, saved["directory"]):
            path = None if directory is None else Path(directory) / _name(digest)
            if path is not None and path.is_file():
                tokens = ReferenceTokens(**_safetensors().load(path.read_bytes()))
                if fingerprint(tokens._asdict()) == digest and comparison.fits(layer, tokens):
                    return tokens
        return None

    def _why_gone(self, saved: Mapping[str, Any]) -> str:
        folders = dict.fromkeys(str(folder) for folder in (self._directory, saved.get("directory")) if folder)
        if not folders:
            return "its hidden states in the reference were not saved, since no `reference_dir` was given"
        return f"its hidden states in the reference are not in {' or '.join(folders)}"

    def _named(self) -> str | None:
        return None if self._directory is None else str(self._directory)


def _name(digest: int) -> str:
    return f"{digest % 2**64:016x}.safetensors"


def _write(path: Path, tokens: ReferenceTokens) -> None:
    """Write a file, unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _safetensors().save(tokens._asdict()))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("the reference is kept by safetensors, which is missing: pip install safetensors.") from error
    return safetensors.torch
