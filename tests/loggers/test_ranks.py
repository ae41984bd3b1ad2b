"""Of several processes, the first is the one that hands out pictures."""

from __future__ import annotations

import pytest

from tests.loggers.on_ranks import train
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_pictures_are_stored_once(framework, tmp_path):
    (value, pictures), (on_other_rank, none) = run_on_ranks(train, 2, str(tmp_path), framework)
    assert value == on_other_rank
    assert pictures
    assert not none
    assert len(list(tmp_path.rglob("events*"))) == 1
