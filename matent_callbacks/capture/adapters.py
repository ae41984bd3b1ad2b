"""Which adapters of a model are on: PEFT makes several models of one by switching them."""

from __future__ import annotations

from typing import Any

from torch import nn


class AdapterState:
    """The adapters that were on when this was made."""

    def __init__(self, model: nn.Module) -> None:
        # Told by what is used of them, so that peft need not be imported; all layers are switched alike.
        self._layer: Any = next((m for m in model.modules() if hasattr(type(m), "adapter_layer_names")), None)
        self._wrapper: Any = next((m for m in model.modules() if hasattr(type(m), "get_base_model")), None)
        self._before = self._now()

    def unchanged(self) -> bool:
        """Whether the same are on."""
        return self._now() == self._before

    def _now(self) -> tuple[Any, ...]:
        layer, wrapper = self._layer, self._wrapper
        in_layers = None if layer is None else (layer.disable_adapters, list(layer.active_adapters))
        # Prompt tuning is in no layer: it is switched off by another `forward` of the model around all.
        return in_layers, None if wrapper is None else wrapper.forward
