"""A disk that is full under W&B's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweep.full_disk import LIMIT
from tests.sweep.runs import FRAMEWORKS, MONITORED, STEPS
from tests.versions import needs


@pytest.mark.parametrize(
    # Older ones end the Trainer's run there, with or without the callback.
    "framework",
    [pytest.param(name, marks=needs("wandb", "0.21") if name == "Trainer" else ()) for name in FRAMEWORKS],
)
def test_training_goes_on_with_its_readings(framework, tmp_path):
    command = [sys.executable, "-m", "tests.sweep.full_disk", framework, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    watched, alone = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert max(path.stat().st_size for path in tmp_path.rglob("*.wandb")) == LIMIT  # it did run full
    assert list(map(int, watched["readings"])) == MONITORED
    assert all("matrix_entropy/last" in values for values in watched["readings"].values())
    assert len(watched["losses"]) == STEPS
    assert (watched["losses"], watched["weights"]) == (alone["losses"], alone["weights"])
