"""`matent measure` under torchrun: the documents are shared out, and the numbers are those of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks.cli._app import run
from matent_callbacks.cli._models import Loaded, load
from tests.cli.models import documents, measured, save_model, write_lines

TIME_LIMIT = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "t5")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one window, with lines that are left out."""
    lines = ["", *documents(600), "a", *documents(60)]
    return write_lines(tmp_path_factory.mktemp("text") / "documents.txt", lines)


def start(world_size: int, *arguments: object, **environment: str) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "matent_callbacks", "measure", *map(str, arguments)],
            env={**os.environ, **address, "OMP_NUM_THREADS": "1", **environment, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world_size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal but for the rounding of sums in another order."""
    assert one["settings"] == other["settings"]
    for a, b in zip(one["models"], other["models"], strict=True):
        assert {key: a[key] for key in a if key != "layers"} == {key: b[key] for key in b if key != "layers"}
        assert a["layers"].keys() == b["layers"].keys()
        for layer, quantities in a["layers"].items():
            assert quantities.keys() == b["layers"][layer].keys()
            for name, value in quantities.items():
                # Pooled quantities are float32, and have no interval.
                known = {key: number for key, number in value.items() if number is not None}
                close = pytest.approx(known, rel=1e-9 if len(known) == 3 else 1e-5)
                assert {key: b["layers"][layer][name][key] for key in known} == close, name


def arguments_for(model: Path, text: Path) -> tuple[object, ...]:
    return (
        *(model, "--text", text, "--layers", "all", "--untrained"),
        *("--metrics", "rankme,effective_rank,embedding_effective_rank,holevo_information,curvature,lidar"),
        *("--embedding", "last", "--batch-tokens", 1000),
    )


def test_values_intervals_and_counts_are_those_of_one_process(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "three.json"
    (code, shown, said), *others = ended(start(3, *arguments_for(model, text), "--out", out))
    assert code == 0, said
    assert "95% bootstrap interval" in shown
    assert others == [(0, "", "")] * 2
    assert said.count("documents are empty") == 1
    alone = measured(tmp_path / "one.json", *arguments_for(model, text))
    assert alone["models"][0]["skipped"] == {"empty": 1, "one_token": 1}
    assert_same(json.loads(out.read_text()), alone)


def test_differences_from_a_baseline_are_those_of_one_process(model: Path, text: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "t5", seed=1)
    arguments = (other, "--baseline", model, "--text", text, "--metrics", "rankme", "--max-sequences", 200)
    out = tmp_path / "two.json"
    results = ended(start(2, *arguments, "--out", out))
    assert [code for code, _, _ in results] == [0, 0], results
    both, alone = json.loads(out.read_text()), measured(tmp_path / "one.json", *arguments)
    for name, quantity in alone["models"][1]["layers"]["last"].items():
        found = both["models"][1]["layers"]["last"][name]["baseline_difference"]
        assert found == pytest.approx(quantity["baseline_difference"], abs=1e-4), name
        assert found["low"] < found["value"] < found["high"]


def test_as_many_sequences_as_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = (model, "--text", text, "--max-sequences", 530, "--batch-tokens", 1000)
    out = tmp_path / "two.json"
    assert [code for code, _, _ in ended(start(2, *arguments, "--out", out))] == [0, 0]
    both = json.loads(out.read_text())
    assert both["models"][0]["num_sequences"] == 530
    assert_same(both, measured(tmp_path / "one.json", *arguments))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3)])
def test_interrupted_and_resumed_with_another_number_of_ranks(
    before: int, after: int, model: Path, tmp_path: Path
) -> None:
    # Long enough to be caught within the first window or the second.
    text = write_lines(tmp_path / "text.txt", documents(700) * 2)
    arguments = (model, "--text", text, "--metrics", "rankme", "--batch-tokens", 100)
    out = tmp_path / "out.json"
    processes = start(before, *arguments, "--out", out)
    deadline = time.monotonic() + TIME_LIMIT
    while not out.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    # One rank alone: the others learn of it.
    processes[-1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _, _ in results] == [130] * before, results
    assert f"interrupted: the same command goes on from {out}" in results[0][2]
    state = json.loads(out.read_text())["_in_progress"][str(model)]["trained"]
    assert 0 < state["sequences"] < 1400
    assert not state["complete"]
    again = ended(start(after, *arguments, "--out", out))
    assert [code for code, _, _ in again] == [0] * after, again
    resumed = json.loads(out.read_text())
    assert "_in_progress" not in resumed
    assert_same(resumed, measured(tmp_path / "whole.json", *arguments))


def test_a_rank_that_fails_is_told_once_and_ends_the_others(model: Path, text: Path, tmp_path: Path) -> None:
    # A sitecustomize that lets the second rank fail in its third batch.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ['RANK'] == '1':\n"
        "    import matent_callbacks.cli._stream as stream\n"
        "    add, calls = stream._add, []\n"
        "    def fails(*args):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3:\n"
        "            raise MemoryError('no room')\n"
        "        add(*args)\n"
        "    stream._add = fails\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    out = tmp_path / "out.json"
    first, second = ended(start(2, model, "--text", text, "--batch-tokens", 1000, "--out", out, PYTHONPATH=path))
    assert (first[0], second[0]) == (1, 1)
    assert first[2] == ""
    assert second[2] == f"matent: {model} cannot be measured: no room\n"


def test_stdin_and_a_device_map_are_for_one_process(model: Path, text: Path) -> None:
    for arguments, words in (
        ((model, "--text", "-"), "--text must be a file or a folder under torchrun"),
        ((model, "--text", text, "--device-map", "auto"), "--device-map spreads one model over all devices"),
    ):
        results = ended(start(2, *arguments))
        assert [code for code, _, _ in results] == [2, 2]
        assert words in results[0][2]
        assert results[1][2] == ""


def test_a_model_spread_by_accelerate_has_the_same_values(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = (model, "--text", text, "--max-sequences", 40, "--untrained")
    spread = measured(tmp_path / "spread.json", *arguments, "--device-map", "auto")
    assert_same(spread, measured(tmp_path / "plain.json", *arguments))


def test_the_untrained_twin_of_a_spread_model_is_refused(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spread(*args: Any, **kwargs: Any) -> Loaded:
        loaded = load(*args, **kwargs)
        loaded.model.hf_device_map = {"encoder": "cpu", "decoder": "disk"}  # as on a machine where it does not fit
        return loaded

    monkeypatch.setattr("matent_callbacks.cli._measure_models.load", spread)
    arguments = ["measure", str(model), "--text", str(text), "--max-sequences", "3", "--untrained"]
    assert run([*arguments, "--device-map", "auto"]) == 1
    assert "is spread over several devices, and --untrained needs a model on one." in capsys.readouterr().err
