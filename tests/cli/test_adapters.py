"""`matent measure` of PEFT adapters: the numbers are those of the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks.cli._app import run
from tests.cli.models import documents, measured, save_adapter, save_model, save_tokenizer, write_lines

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "documents.txt", documents(12))


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("llama", "AutoModelForCausalLM", "CAUSAL_LM"),
        ("llama", "AutoModelForCausalLM", None),
        ("llama", "AutoModel", "FEATURE_EXTRACTION"),
        ("bert", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ],
)
def test_values_are_those_of_the_merged_model(
    kind: str, head: str, task: str | None, text: Path, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", kind)
    adapter, merged = save_adapter(tmp_path / "adapter", base, head=head, task=task), tmp_path / "merged"
    save_adapter(merged, base, head=head, task=task, merge=True)
    save_tokenizer(merged)
    arguments = ("--text", text, "--layers", "all", "--dtype", "float64")
    content = measured(tmp_path / "out.json", base, adapter, merged, *arguments)
    of_base, of_adapter, of_merged = ({**entry["layers"]} for entry in content["models"])
    assert of_adapter.keys() == of_base.keys()
    for layer, quantities in of_merged.items():
        for name, quantity in quantities.items():
            assert of_adapter[layer][name] == pytest.approx(quantity, rel=1e-6), (layer, name)
    entropies = [of["last"]["sequence_matrix_entropy"]["value"] for of in (of_adapter, of_base)]
    assert entropies[0] != pytest.approx(entropies[1], rel=1e-3)


def test_an_untrained_twin_has_no_adapter(text: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    content = measured(tmp_path / "out.json", base, adapter, "--text", text, "--untrained")
    name = "untrained_sequence_matrix_entropy"
    first, second = (entry["layers"]["last"][name] for entry in content["models"])
    assert first == second


def test_tokens_that_were_added_for_the_training(text: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = save_model(tmp_path / "base", "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["the"])
    adapter = save_adapter(tmp_path / "adapter", base, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(adapter)
    plain, extended = measured(tmp_path / "out.json", base, adapter, "--text", text)["models"]
    assert extended["num_tokens"] != plain["num_tokens"]


def test_the_baseline_is_the_base_where_that_is_not_there(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    there = measured(tmp_path / "there.json", adapter, "--baseline", base, "--text", text)
    assert "is put on the baseline" not in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    capsys.readouterr()
    moved = measured(tmp_path / "moved.json", adapter, "--baseline", base, "--text", text)
    told = f"matent: {adapter} is put on the baseline {base}: its own base /gone/base is not on this machine.\n"
    assert told in capsys.readouterr().err
    assert moved["models"] == there["models"]
    assert run(["measure", str(adapter), "--text", str(text)]) == 1
    told = f"matent: {adapter} is an adapter of /gone/base, which is not there: give the folder of its base as "
    assert capsys.readouterr().err == f"{told}--baseline.\n"


@pytest.mark.parametrize("change", ["width", "depth", "pickled", "prompt", "damaged"])
def test_adapters_that_cannot_be_measured(
    change: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = ""
    if change == "width":
        save_model(base, "llama", width=64)
        expected = f"{adapter} does not fit its base: size mismatch for"
    elif change == "depth":
        own: dict[str, Any] = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**own, "num_hidden_layers": 1, "layer_types": None}))
        expected = f"{adapter} does not fit its base: there is no place, or no weight, for"
    elif change == "pickled":
        from safetensors.torch import load_file

        torch.save(load_file(file), adapter / "adapter_model.bin")
        file.unlink()
        expected = f"{adapter} has its weights pickled (adapter_model.bin)"
    elif change == "prompt":
        prompt = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        named = {"base_model_name_or_path": config["base_model_name_or_path"]}
        (adapter / "adapter_config.json").write_text(json.dumps({**prompt, **named}))
        expected = f"{adapter} is an adapter of virtual tokens (PROMPT_TUNING)"
    else:
        (adapter / "adapter_config.json").write_text("{")
        expected = f"{adapter} has an adapter_config.json that peft cannot read."
    capsys.readouterr()
    assert run(["measure", str(adapter), "--text", str(text)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"matent: {expected}"), told
    assert told.count("\n") == 1
