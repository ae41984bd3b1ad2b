"""Models that are built once for a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.alignment.families import FAMILIES


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = FAMILIES[name].build()
        return made[name]

    return get
