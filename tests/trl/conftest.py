from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer in bf16 leaves it, before transformers 5, in the environment for those that come later."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
