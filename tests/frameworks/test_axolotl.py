"""Axolotl, by its own command, with the plugin in its YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.conftest import assert_same_training, log_history, steps_with

PLUGIN = "matent_callbacks.integrations.axolotl.MatentPlugin"
SECTION = {
    "every_n_steps": 2,
    "layers": "all",
    "probe": ["the cat sat on the mat", "a dog ran over green hills"],
    "collapse": None,
    "plateau": {"monitor": "effective_rank/last", "mode": "any", "min_delta": 0.01, "patience": 5},
}


@pytest.fixture
def config(only_with: Any, model: Path, data: Path, tmp_path: Path) -> Any:
    only_with("axolotl")
    import yaml

    def write(**settings: Any) -> str:
        path = tmp_path / "config.yaml"
        given = {
            "base_model": str(model),
            "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "val_set_size": 0.25,
            "eval_steps": 4,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 8,
            "save_steps": 8,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            # It would choose half precision, and kernels for GPUs.
            **dict.fromkeys(("bf16", "fp16", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
            "plugins": [PLUGIN],
            **settings,
        }
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        return str(path)

    return write


def test_readings_are_in_its_log(config, call, tmp_path):
    done = call("axolotl", "train", config(matent=SECTION))
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("matent_callbacks ")]
    assert "MatrixEntropyCallback(every_n_steps=2, layers='all', probe=[" in line
    assert "CollapseAlarm()" in line
    history = log_history(tmp_path / "out")
    for layer in ("layer_00", "layer_01", "last"):
        assert steps_with(history, f"effective_rank/{layer}") == [2, 4, 6, 8]
        assert set(steps_with(history, f"eval_effective_rank/{layer}")) >= {4, 8}
    assert steps_with(history, "plateau/effective_rank/last/since_progress") == [2, 4, 6, 8]
    assert "effective_rank/last" in done.stdout


def test_training_is_bitwise_the_same(config, call, tmp_path):
    # Without an adapter: axolotl makes those from random numbers that no seed fixes.
    for folder, settings in (("out", {"matent": SECTION}), ("plain", {"plugins": []})):
        done = call("axolotl", "train", config(output_dir=str(tmp_path / folder), adapter=None, **settings))
        assert done.returncode == 0, done.stdout[-3000:]
    assert steps_with(log_history(tmp_path / "out"), "effective_rank/last") == [2, 4, 6, 8]
    assert_same_training(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matent": {"every_n_step": 2}}, "`matent` has no setting 'every_n_step': did you mean 'every_n_steps'?"),
        ({"matnt": {}}, "There is no `matent:` section"),
    ],
    ids=["unknown", "missing"],
)
def test_what_is_wrong_is_told_before_training(settings, message, config, call, tmp_path):
    done = call("axolotl", "train", config(**settings))
    assert done.returncode != 0
    assert message in done.stdout
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("trainer_state.json"))
