"""Keeps the names of a monitor's numbers the same from one reading to the next, and tells each problem once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

_Item = TypeVar("_Item", bound=Hashable)


class Remembered:
    """Remembers what earlier readings have logged and warned of. Monitors of one run may share it.

    Args:
        mentioned: Problems that were told of before: monitors that log other names may share these alone.
    """

    def __init__(self, mentioned: set[object] | None = None) -> None:
        self._names: dict[str, dict[str, None]] = {}
        self._mentioned = set[object]() if mentioned is None else mentioned

    def complete(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return values by layer and name as ``{"<name>/<layer>": value}``; NaN for what only earlier readings have."""
        for layer, own in values.items():
            self._names.setdefault(layer, {}).update(dict.fromkeys(own))
        return {
            f"{name}/{layer}": values.get(layer, {}).get(name, math.nan)
            for name in dict.fromkeys(name for names in self._names.values() for name in names)
            for layer, names in self._names.items()
            if name in names
        }

    def untold(self, kind: str, items: Iterable[_Item]) -> list[_Item]:
        """Return the items of a kind of problem that were not passed before."""
        new = [item for item in items if (kind, item) not in self._mentioned]
        self._mentioned.update((kind, item) for item in new)
        return new
