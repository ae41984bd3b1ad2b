"""Ms-swift, by its own command, with the plugin file and the settings in its YAML or in the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.conftest import ROOT, assert_same_training, log_history, steps_with

PLUGIN = ROOT / "matent_callbacks" / "integrations" / "ms_swift.py"
SECTION = {
    "every_n_steps": 2,
    "layers": "all",
    "probe": ["the cat sat on the mat", "a dog ran over green hills"],
    "prog_bar": False,
    "plateau": {"monitor": "effective_rank/last", "mode": "any", "min_delta": 0.01, "patience": 5},
}


@pytest.fixture
def config(only_with: Any, model: Path, data: Path, tmp_path: Path) -> Any:
    only_with("swift")
    import yaml

    def write(**settings: Any) -> str:
        path = tmp_path / "train.yaml"
        given = {
            "model": str(model),
            "model_type": "qwen2",
            "template": "qwen",
            "dataset": [str(data)],
            "split_dataset_ratio": 0.25,
            "output_dir": str(tmp_path / "out"),
            "tuner_type": "lora",
            "lora_rank": 4,
            "torch_dtype": "float32",
            "max_length": 128,
            "max_steps": 8,
            "eval_steps": 4,
            "save_steps": 8,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "external_plugins": [str(PLUGIN)],
            "callbacks": ["matent"],
            **settings,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        path.write_text(yaml.safe_dump(kept), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("where", ["in the YAML", "in a file"])
def test_readings_are_in_its_log(where, config, call, tmp_path):
    (tmp_path / "matent.yaml").write_text(json.dumps({"matent": SECTION}), encoding="utf-8")
    settings = {"ENV": {"MATENT": SECTION}} if where == "in the YAML" else {}
    environment = {"MATENT": "matent.yaml"} if where == "in a file" else {}
    done = call("swift", "sft", config(**settings), **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("matent_callbacks ")]
    assert "MatrixEntropyCallback(every_n_steps=2, layers='all', probe=[" in line
    history = log_history(tmp_path / "out")
    (own,) = (tmp_path / "out").rglob("logging.jsonl")
    rows = [json.loads(row) for row in own.read_text(encoding="utf-8").splitlines()]
    for layer in ("layer_00", "layer_01", "last"):
        assert steps_with(history, f"effective_rank/{layer}") == [2, 4, 6, 8]
        assert set(steps_with(history, f"eval_effective_rank/{layer}")) >= {4, 8}
        assert sum(f"effective_rank/{layer}" in row for row in rows) == 4
    assert steps_with(history, "plateau/effective_rank/last/since_progress") == [2, 4, 6, 8]

    if where == "in the YAML":
        plain = call("swift", "sft", config(output_dir=str(tmp_path / "plain"), external_plugins=None, callbacks=None))
        assert plain.returncode == 0, plain.stdout[-3000:]
        assert_same_training(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MATENT": "{every_n_step: 2}"}, "`matent` has no setting 'every_n_step': did you mean 'every_n_steps'?"),
        ({"MATENT": "nowhere.yaml"}, "must hold settings or the path of a YAML file, got 'nowhere.yaml'"),
        ({}, "Set the environment variable MATENT to the settings of matent_callbacks"),
    ],
    ids=["unknown", "no file", "missing"],
)
def test_what_is_wrong_is_told_before_training(environment, message, config, call, tmp_path):
    done = call("swift", "sft", config(), **environment)
    assert done.returncode != 0
    assert message in done.stdout
    assert not list(tmp_path.rglob("trainer_state.json"))


def test_the_module_prints_the_path_of_the_plugin_file(call):
    import sys

    done = call(sys.executable, "-m", "matent_callbacks.integrations.ms_swift")
    assert done.stdout.strip() == str(PLUGIN)
