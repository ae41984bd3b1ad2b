"""LLaMA-Factory, by the launcher that takes its YAML."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.conftest import assert_same_training, log_history, steps_with

LAUNCHER = (sys.executable, "-m", "matent_callbacks.integrations.llamafactory")
SECTION = {
    "every_n_steps": 2,
    "layers": "all",
    "probe": ["the cat sat on the mat", "a dog ran over green hills"],
    "plateau": {"monitor": "effective_rank/last", "mode": "any", "min_delta": 0.01, "patience": 5},
}


@pytest.fixture
def config(only_with: Any, model: Path, data: Path, tmp_path: Path) -> Any:
    only_with("llamafactory")
    import yaml

    about = {"own": {"file_name": data.name, "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")

    def write(**settings: Any) -> str:
        path = tmp_path / "train.yaml"
        given = {
            "model_name_or_path": str(model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "dataset_dir": str(tmp_path),
            "dataset": "own",
            "template": "qwen",
            "cutoff_len": 128,
            "val_size": 0.25,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 8,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            **settings,
        }
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        return str(path)

    return write


def test_readings_are_in_its_log(config, call, tmp_path):
    done = call(*LAUNCHER, config(matent=SECTION))
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("matent_callbacks ")]
    assert "MatrixEntropyCallback(every_n_steps=2, layers='all', probe=[" in line
    history = log_history(tmp_path / "out")
    for layer in ("layer_00", "layer_01", "last"):
        assert steps_with(history, f"effective_rank/{layer}") == [2, 4, 6, 8]
        assert set(steps_with(history, f"eval_effective_rank/{layer}")) >= {4, 8}
    assert steps_with(history, "plateau/effective_rank/last/since_progress") == [2, 4, 6, 8]
    assert "effective_rank/last" in done.stdout

    plain = call("llamafactory-cli", "train", config(output_dir=str(tmp_path / "plain")))
    assert plain.returncode == 0, plain.stdout[-3000:]
    assert_same_training(tmp_path / "out", tmp_path / "plain")


def test_the_command_line_replaces_what_the_file_says(config, call, tmp_path):
    done = call(*LAUNCHER, config(matent=SECTION), "matent.every_n_steps=4")
    assert done.returncode == 0, done.stdout[-3000:]
    assert steps_with(log_history(tmp_path / "out"), "effective_rank/last") == [4, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matent": {"every_n_step": 2}}, "`matent` has no setting 'every_n_step': did you mean 'every_n_steps'?"),
        ({"matnt": {}}, "There is no `matent:` section"),
    ],
    ids=["unknown", "missing"],
)
def test_what_is_wrong_is_told_before_training(settings, message, config, call, tmp_path):
    done = call(*LAUNCHER, config(**settings))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(message)
    assert not (tmp_path / "out").exists()


def test_swanlab_which_is_built_in_gets_numbers_and_pictures(config, call, tmp_path):
    pytest.importorskip("swanlab")
    from tests.loggers.libraries import PICTURES, SwanLab

    logs = tmp_path / "swanlog"
    own = {"use_swanlab": True, "swanlab_mode": "local", "swanlab_logdir": str(logs)}
    done = call(*LAUNCHER, config(matent=SECTION, **own))
    assert done.returncode == 0, done.stdout[-3000:]
    stored = SwanLab(logs).stored()
    history = log_history(tmp_path / "out")
    for key in ("effective_rank/last", "matrix_entropy/layer_01"):
        expected = {record["step"]: pytest.approx(record[key]) for record in history if key in record}
        assert stored.numbers[f"train/{key}"] == expected
    assert sorted(stored.pictures) == PICTURES
    assert list(stored.pictures[PICTURES[0]]) == [4, 6, 8]


def test_two_processes_have_one_reading(config, call, tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", *LAUNCHER[1:])
    done = call(sys.executable, *launch, config(matent=SECTION, ddp_backend="gloo"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("MatrixEntropyCallback(every_n_steps=2") == 1
    assert steps_with(log_history(tmp_path / "out"), "effective_rank/last") == [2, 4, 6, 8]
