from __future__ import annotations

import subprocess
import sys

import pytest

import matent_callbacks
from matent_callbacks.cli._app import run


def test_help_needs_nothing_heavy() -> None:
    code = """
import sys
from matent_callbacks.cli._app import run
assert run(["--help"]) == 0
assert run(["measure", "--help"]) == 0
heavy = {"torch", "numpy", "transformers", "torchmetrics", "matplotlib", "scipy", "lightning"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "zcat corpus.jsonl.gz | matent measure" in " ".join(done.stdout.split())


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "matent_callbacks", "mesure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "matent: No such command 'mesure'. Did you mean 'measure'?\n"


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "measure" in capsys.readouterr().out


def test_without_its_libraries_it_tells_how_to_get_them() -> None:
    code = "import sys; sys.modules['typer'] = None; from matent_callbacks.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "matent: the command line needs typer: pip install 'matent-callbacks[cli]'\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"matent {matent_callbacks.__version__}\n"


def test_what_the_package_exports_is_there_before_it_is_loaded() -> None:
    code = """
import sys, matent_callbacks
assert "torch" not in sys.modules
assert set(matent_callbacks.__all__) <= set(dir(matent_callbacks))
for name in matent_callbacks.__all__:
    assert getattr(matent_callbacks, name).__name__ == name
assert matent_callbacks.functional.effective_rank
"""
    subprocess.run([sys.executable, "-c", code], check=True)
