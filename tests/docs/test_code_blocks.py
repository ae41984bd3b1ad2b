"""Every block of code of the README and of the pages does what it says: Python is run, and commands exist."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import TrainerState
from typer.main import get_command

from tests.docs.fences import PAGES, ROOT, blocks
from tests.docs.names import names_for
from tests.versions import older, require

WITH_PYTHON = [name for name, page in PAGES.items() if blocks(page, "python")]
WITH_BASH = [name for name, page in PAGES.items() if blocks(page, "bash")]


@pytest.fixture
def own_folder(tmp_path: Path, own_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pages' relative paths lead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if older("transformers", "5.0"):
        # A Trainer that reports to all that is installed asks trackio for a login there.
        monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    records = [{"step": step, "loss": 3.0 - step, "effective_rank/last": 2.0 + step} for step in (1, 2)]
    state = TrainerState(log_history=records, global_step=2, max_steps=2)
    (tmp_path / "runs" / "llava").mkdir(parents=True)
    state.save_to_json(str(tmp_path / "runs" / "llava" / "trainer_state.json"))
    return tmp_path


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A distributed run of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error:.*was never logged.*", "error:.*there is no reading.*")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, own_folder: Path, request: pytest.FixtureRequest):
    if page == "docs/at_scale.md":
        request.getfixturevalue("one_process")
    if page == "docs/multimodal.md":
        require("transformers", "5.0")
    names: dict[str, Any] = {**names_for(page), "__name__": "page"}
    for block in blocks(PAGES[page], "python"):
        before = names.get("trainer")
        # Lines as in the page, so that a traceback points there.
        exec(compile("\n" * (block.line - 1) + block.code, PAGES[page], "exec"), names)
        if names.get("trainer") is not before:
            assert any(key.endswith(("/last", "/layer_01", "/image_text")) for key in logged(names["trainer"]))


def logged(trainer: Any) -> set[str]:
    """Of a Trainer of either framework."""
    if hasattr(trainer, "callback_metrics"):
        return set(trainer.callback_metrics)
    return {key for record in trainer.state.log_history for key in record}


def test_every_fence_says_what_is_in_it():
    for name, page in PAGES.items():
        found = blocks(page)
        assert {block.language for block in found} <= {"python", "bash", "json", "text"}, name
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(found), name


def test_json_can_be_read():
    for page in PAGES.values():
        for block in blocks(page, "json"):
            json.loads(block.code)


@pytest.mark.parametrize("page", WITH_BASH)
def test_commands_exist(page: str):
    for block in blocks(PAGES[page], "bash"):
        for program, *arguments in commands(block.code):
            CHECKS[program](arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        "make dema",
        "python examples/pretrain.py",
        "python -m matent",
        "python examples/pretrain_text.py --stops 3",
        "matent report x --to y",
    ],
)
def test_a_command_that_does_not_exist_is_found(wrong: str):
    ((program, *arguments),) = commands(wrong)
    with pytest.raises(AssertionError):
        CHECKS[program](arguments)


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of some lines of shell, without the assignments in front of them."""
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.shlex(line, posix=True, punctuation_chars=True), ";"]:
            if not set(word) <= set("|&;"):
                words += [word] if words or not re.fullmatch(r"\w+=.*", word) else []
            elif words:
                yield words
                words = []


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets)


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]
        return
    script = ROOT / arguments[0]
    assert script.is_file(), script
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in script.read_text(encoding="utf-8"), flag


def check_pip(arguments: list[str]) -> None:
    """Of this package, from a checkout, with extras, which ``pyproject.toml`` must have."""
    extras = re.fullmatch(r"(?:matent-callbacks|\.)\[([\w,]+)\]", arguments[1])
    assert extras is not None, arguments
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def check_matent(arguments: list[str]) -> None:
    command, *words = arguments
    if command == "--help":
        return
    module = importlib.import_module(f"matent_callbacks.cli.{command}")
    app = typer.Typer(add_completion=False)
    app.command()(getattr(module, command))
    options = {option for parameter in get_command(app).params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def check_torchrun(arguments: list[str]) -> None:
    check_matent(arguments[arguments.index("matent_callbacks") + 1 :])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "matent": check_matent,
    "torchrun": check_torchrun,
    "zcat": lambda arguments: None,
}
