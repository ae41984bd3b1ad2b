"""The examples run as they are, with the flags that make them short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from tests.wandb_history import read_history

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_pretrain_text(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    output = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "pretrain_text.py"), str(text), "--size", "small"]
    done = subprocess.run(
        [*command, "--steps", "5", "--every", "2", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("layer_", "last"))]
    assert [row[0] for row in table] == ["layer_00", "layer_01", "layer_02", "layer_03", "last"]
    for _, _, _, start, end, difference in table:
        assert abs(float(start) - float(end) - float(difference)) < 0.011
    assert (output / "overview.png").read_bytes().startswith(b"\x89PNG")
    steps = [row["train/global_step"] for row in read_history(output) if "train/effective_rank/last" in row]
    assert steps == [2, 4, 5]
