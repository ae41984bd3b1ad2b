"""`matent measure --baseline`: differences on the same documents, with intervals of paired resamples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from matent_callbacks.cli._app import run
from matent_callbacks.cli._entries import GROUPS
from matent_callbacks.cli._state import group_of
from tests.cli.models import documents, last, measured, save_model, save_tokenizer, write_lines
from tests.conftest import slow_entropy, slow_pooled_entropy

COUNT = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "documents.txt", documents(COUNT))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one that is a little different."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base", "llama")
    tuned: Any = AutoModel.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    save_tokenizer(folder / "tuned")
    return base, folder / "tuned"


def hidden_states(folder: Path, lines: list[str]) -> list[torch.Tensor]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        inputs = (tokenizer(line, return_tensors="pt", truncation=True, max_length=128) for line in lines)
        return [model(input_ids=one["input_ids"])[0][0] for one in inputs]


def test_differences_of_means_have_the_interval_of_pairs(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    base, tuned = models
    content = measured(tmp_path / "out.json", tuned, "--baseline", base, "--text", text, "--dtype", "float64")
    assert [entry["model"] for entry in content["models"]] == [str(base), str(tuned)]
    assert "baseline" not in content["models"][0]
    assert content["models"][1]["baseline"] == str(base)
    lines = text.read_text().splitlines()
    before, after = (np.array([slow_entropy(z) for z in hidden_states(folder, lines)]) for folder in models)
    found, single = last(content, 1)["sequence_matrix_entropy"]["baseline_difference"], last(content, 1)
    assert found["value"] == pytest.approx((after - before).mean(), abs=1e-9)
    error = (after - before).std() / COUNT**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    own = single["sequence_matrix_entropy"]
    assert found["high"] - found["low"] < (own["high"] - own["low"]) / 2  # what the pairing is for
    ranks = [last(content, index)["sequence_effective_rank"]["value"] for index in (0, 1)]
    difference = single["sequence_effective_rank"]["baseline_difference"]
    assert difference["value"] == pytest.approx(ranks[1] - ranks[0])
    assert difference["low"] < difference["value"] < difference["high"]


def test_pooled_differences_have_the_interval_of_the_jackknife(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, tuned = models
    arguments = ("--text", text, "--metrics", "matrix_entropy", "--batch-tokens", 500, "--dtype", "float64")
    content = measured(tmp_path / "out.json", tuned, "--baseline", base, *arguments)
    lines = text.read_text().splitlines()
    groups = [group_of(0, document, GROUPS) for document in range(COUNT)]
    assert set(groups) == set(range(GROUPS))
    states = [hidden_states(folder, lines) for folder in models]

    def difference(kept: list[int]) -> float:
        entropies = []
        for own in states:
            padded = torch.nn.utils.rnn.pad_sequence([own[i] for i in kept], batch_first=True)
            mask = torch.tensor([[t < len(own[i]) for t in range(padded.shape[1])] for i in kept])
            entropies.append(slow_pooled_entropy(padded, mask))
        return entropies[1] - entropies[0]

    without = np.array([difference([i for i in range(COUNT) if groups[i] != g]) for g in range(GROUPS)])
    error = ((GROUPS - 1) / GROUPS * ((without - without.mean()) ** 2).sum()) ** 0.5
    value, half = difference(list(range(COUNT))), student.ppf(0.975, GROUPS - 1) * error
    found = last(content, 1)["matrix_entropy"]["baseline_difference"]
    expected = {"value": value, "low": value - half, "high": value + half}
    assert found == pytest.approx(expected, abs=2e-2 * half)
    # The value itself is not changed by the groups.
    alone = measured(tmp_path / "alone.json", tuned, *arguments)
    assert last(content, 1)["matrix_entropy"]["value"] == pytest.approx(last(alone)["matrix_entropy"]["value"])
    assert last(alone)["matrix_entropy"]["low"] is None


def test_a_copy_differs_by_nothing(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    metrics = "effective_rank,rankme,embedding_effective_rank,curvature,holevo_information,lidar"
    arguments = ("--baseline", models[0], "--text", text, "--layers", "all", "--untrained", "--metrics", metrics)
    content = measured(tmp_path / "out.json", copy, *arguments)
    for layer, quantities in content["models"][1]["layers"].items():
        assert {"diff_erank", *metrics.split(",")} < quantities.keys()
        for name, quantity in quantities.items():
            assert quantity["baseline_difference"] == {"value": 0, "low": 0, "high": 0}, (layer, name)


def test_a_model_measured_later_is_compared_with_the_same_baseline(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = models
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    arguments = ("--baseline", base, "--text", text, "--metrics", "rankme")
    measured(tmp_path / "out.json", copy, *arguments)
    capsys.readouterr()
    later = measured(tmp_path / "out.json", copy, tuned, *arguments)
    assert capsys.readouterr().err.count("already") == 2
    assert later["models"] == measured(tmp_path / "once.json", copy, tuned, *arguments)["models"]


def test_what_limits_a_comparison_is_told(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    base, _ = models
    wide = save_model(tmp_path / "wide", "llama", width=64)
    other = save_model(tmp_path / "other", "llama")
    file = json.loads((other / "tokenizer.json").read_text())
    file["model"]["merges"] = file["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer.from_file(str(other / "tokenizer.json")).encode("the the").ids
    arguments = ("--baseline", base, "--text", text, "--max-length", 64)
    capsys.readouterr()
    content = measured(tmp_path / "out.json", wide, other, *arguments)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"matent: {wide} has width 64 and its baseline {base} 32")
    assert f"{other} was not given the tokens that its baseline {base} was given (40 documents and" in told[1]
    assert all("baseline_difference" in last(content, i)["sequence_effective_rank"] for i in (1, 2))


def test_differences_are_of_the_layers_that_both_have(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel

    base, _ = models
    shallow, bert = tmp_path / "shallow", save_model(tmp_path / "bert", "bert")
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    model: Any = AutoModel.from_pretrained(base)
    del model.layers[1]
    model.save_pretrained(shallow)
    (shallow / "config.json").write_text(json.dumps(config))
    save_tokenizer(shallow)
    arguments = ("--baseline", base, "--text", text, "--max-length", 64)
    content = measured(tmp_path / "all.json", shallow, *arguments, "--layers", "all")
    assert "at 2 layers and its baseline" in (told := capsys.readouterr().err)
    assert "at 3: there are differences for the 2 that both have." in told
    quantities = content["models"][1]["layers"]
    assert all("baseline_difference" in quantities[layer]["sequence_effective_rank"] for layer in ("layer_00", "last"))
    content = measured(tmp_path / "norms.json", bert, *arguments, "--layers", "*[nN]orm")
    assert f"{bert} and its baseline {base} have no layer in common" in capsys.readouterr().err
    assert not any(
        "baseline_difference" in of for layer in content["models"][1]["layers"].values() for of in layer.values()
    )


def test_without_its_baseline_nothing_is_measured(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["measure", str(models[1]), "--baseline", str(tmp_path / "empty"), "--text", str(text)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1:] == ["matent: without its baseline nothing is compared, so no model is measured."]


def test_table_and_picture(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = models
    arguments = ["measure", str(base), str(tuned), "--baseline", f"{base}/", "--text", str(text), "--layers", "all"]
    assert run([*arguments, "--metrics", "rankme,spectrum", "--plot", str(tmp_path / "layers.png")]) == 0
    shown = capsys.readouterr()
    assert "the baseline, on the same documents" in shown.out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert shown.err.splitlines()[-1] == f"matent: picture: {tmp_path / 'layers.png'}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{base}", "--baseline", "{base}"], "--baseline is what MODEL is compared with, and both are"),
        (["{tuned}", "--baseline", "./nowhere"], "--baseline must be a folder or a name on the hub, and ./nowhere is"),
        (["{tuned}", "--plot", "layers.txt"], "--plot must be a picture, like .png, .svg or .pdf, and is layers.txt."),
        (["{tuned}", "--plot", "nowhere/a.png"], "--plot is to be in"),
    ],
)
def test_bad_arguments(
    arguments: list[str], told: str, models: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(base=models[0], tuned=models[1]) for argument in arguments]
    assert run(["measure", *filled, "--text", str(text)]) == 2
    assert told in capsys.readouterr().err
