"""Tells which adapters of a model are active: by switching them, PEFT turns one model into several."""

from __future__ import annotations

from typing import Any

from torch import nn

from matent_callbacks.capture.values import all_modules


class AdapterState:
    """The adapters that were active when this was created."""

    def __init__(self, model: nn.Module) -> None:
        # Recognised by the attributes used here, so that peft need not be imported; all layers are switched together.
        self._layer: Any = next((m for m in all_modules(model) if hasattr(type(m), "adapter_layer_names")), None)
        self._wrapper: Any = next((m for m in all_modules(model) if hasattr(type(m), "get_base_model")), None)
        self._before = self._now()

    def unchanged(self) -> bool:
        """Whether the same adapters are active now."""
        return self._now() == self._before

    def _now(self) -> tuple[Any, ...]:
        layer, wrapper = self._layer, self._wrapper
        in_layers = None if layer is None else (layer.disable_adapters, list(layer.active_adapters))
        # Prompt tuning is not in any layer: PEFT disables it by replacing the `forward` of the outermost model.
        return in_layers, None if wrapper is None else wrapper.forward
