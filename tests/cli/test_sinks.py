"""Attention sinks in `matent measure`: left out unless `--include-sinks` is given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks.cli._app import run
from matent_callbacks.cli._results import Results
from matent_callbacks.cli._state import State
from matent_callbacks.functional import sink_tokens
from tests.cli.models import documents, last, measured, save_model, save_tokenizer, write_lines
from tests.conftest import slow_entropy, slow_pooled_entropy

COUNT = 30
METRICS = ("--metrics", "matrix_entropy,sink_tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each document begins with the same token."""
    lines = [f"#{line}" for line in documents(COUNT)]
    return write_lines(tmp_path_factory.mktemp("text") / "documents.txt", lines)


def save_with_sink(folder: Path, *, factor: float, seed: int = 0) -> Path:
    """A model that makes this token long in its first layers; the final norm makes it as long as the others."""
    from transformers import AutoModel, AutoTokenizer

    save_model(folder, "llama", seed=seed)
    model: Any = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.embed_tokens.weight[AutoTokenizer.from_pretrained(folder)("#")["input_ids"][0]] *= factor
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_with_sink(folder / "base", factor=100), save_with_sink(folder / "tuned", factor=40, seed=1)


def hidden_states(folder: Path, lines: list[str]) -> list[list[torch.Tensor]]:
    """``[layer][document]``."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        ids = (tokenizer(line, return_tensors="pt", truncation=True, max_length=128)["input_ids"] for line in lines)
        found = [model(one, output_hidden_states=True).hidden_states for one in ids]
    return [[states[0] for states in layer] for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("include", [False, True])
def test_numbers_are_those_of_the_other_tokens(
    include: bool, models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    switch = ["--include-sinks"] if include else []
    arguments = ("--text", text, "--layers", "all", *METRICS, "--dtype", "float64", "--batch-tokens", 300, *switch)
    content = measured(tmp_path / "out.json", *models, "--baseline", models[0], *arguments)
    lines = text.read_text().splitlines()
    for folder, entry in zip(models, content["models"], strict=True):
        layers = dict(zip(entry["layers"], hidden_states(folder, lines), strict=True))
        for layer, states in layers.items():
            sinks = [sink_tokens(z) for z in states]
            kept = states if include else [z[~found] for z, found in zip(states, sinks, strict=True)]
            found = {name: of["value"] for name, of in entry["layers"][layer].items()}
            mean = sum(map(slow_entropy, kept)) / COUNT
            assert found["sequence_matrix_entropy"] == pytest.approx(mean, abs=1e-7), layer
            padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
            mask = torch.tensor([[t < len(z) for t in range(padded.shape[1])] for z in kept])
            assert found["matrix_entropy"] == pytest.approx(slow_pooled_entropy(padded, mask), abs=1e-5), layer
            number = sum(int(one.sum()) for one in sinks)
            assert (number >= COUNT) == (layer != "last")
            assert found["sink_tokens"] == pytest.approx(number / COUNT)  # whether they count or not
        ratios = [(z.norm(dim=1).log() - z.norm(dim=1).log().mean())[sink_tokens(z)] for z in layers["layer_00"]]
        ratio = torch.cat(ratios)
        expected = {"tokens": len(ratio), "times_as_long": pytest.approx(math.exp(ratio.mean()), rel=1e-6)}
        told = entry["left_out_sinks"]
        assert told == {} if include else (told.keys() == {"layer_00", "layer_01"} and told["layer_00"] == expected)


def test_the_last_layer_and_models_without_sinks_do_not_change(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    plain = save_model(tmp_path / "plain", "llama")
    metrics = ("--metrics", "matrix_entropy,rankme,embedding_rankme,holevo_information,curvature,lidar")
    arguments = (models[0], plain, "--text", text, "--layers", "all", *metrics, "--untrained")
    without = measured(tmp_path / "without.json", *arguments)
    included = measured(tmp_path / "included.json", *arguments, "--include-sinks")
    assert last(without) == last(included)
    assert without["models"][1] == included["models"][1]
    layers = [content["models"][0]["layers"]["layer_00"] for content in (without, included)]
    assert all(layers[0][name] != layers[1][name] for name in layers[0] if not name.startswith("untrained"))


def test_a_long_vector_of_a_document_is_no_sink(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_model(tmp_path / "bert", "bert")
    text = write_lines(tmp_path / "documents.txt", documents(COUNT))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder)
    ids = (tokenizer(line, return_tensors="pt", truncation=True, max_length=64) for line in documents(COUNT))
    with torch.no_grad():
        states = torch.cat([model(one["input_ids"])[0][:, 0] for one in ids])
        lengths = torch.ones(COUNT)
        lengths[7] = 20.0
        model.pooler.dense.weight[0] = torch.linalg.lstsq(states, lengths).solution
        assert sink_tokens(model.pooler.dense(states)).nonzero().tolist() == [[7]]
    model.save_pretrained(folder)
    save_tokenizer(folder)
    arguments = (folder, "--text", text, "--layers", "pooler.dense", "--metrics", "embedding_rankme")
    one_batch = (*arguments, "--batch-tokens", 10_000)
    without = measured(tmp_path / "without.json", *one_batch)
    assert without["models"] == measured(tmp_path / "with.json", *one_batch, "--include-sinks")["models"]


def test_one_line_at_the_end_says_where_they_were(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_model(tmp_path / "plain", "llama")
    out = tmp_path / "out.json"
    for _ in range(2):  # measured, and read from the file
        content = measured(out, *models, plain, "--text", text, "--layers", "all")
        (told,) = (line for line in capsys.readouterr().err.splitlines() if "sinks" in line)
        ratios = [of["times_as_long"] for e in content["models"] for of in e["left_out_sinks"].values()]
        assert told == (
            f"matent: {models[0]}, {models[1]}: Attention sinks, a few tokens that are {min(ratios):.0f} to "
            f"{max(ratios):.0f} times as long as the others of their sequence, are left out of the numbers of "
            "layer_00, layer_01: these would describe them and nothing else. --include-sinks includes them. See the "
            "page on pretrained models in the documentation."
        )
    measured(tmp_path / "included.json", *models, "--text", text, "--layers", "all", "--include-sinks")
    assert "sinks" not in capsys.readouterr().err


def test_results_with_and_without_sinks_are_not_mixed(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["measure", str(models[0]), "--text", str(text), "--layers", "0", "--out", str(out)]
    content = measured(out, *arguments[1:-2], "--include-sinks")
    assert run(arguments) == 2
    assert "--include-sinks was True and is False" in capsys.readouterr().err
    # Before this setting there was nothing else.
    del content["settings"]["include_sinks"], content["models"][0]["left_out_sinks"]
    out.write_text(json.dumps(content))
    assert run(arguments) == 2
    assert "--include-sinks was True and is False" in capsys.readouterr().err
    again = measured(out, *map(str, models), *arguments[2:-2], "--include-sinks")
    assert again["models"][0] == content["models"][0]
    assert again["settings"]["include_sinks"]


def test_sinks_of_other_ranks_and_of_an_interrupted_measurement_count(tmp_path: Path) -> None:
    state = State(sinks={"layer_01": [2, 7.5]})
    state.add(State(sinks={"layer_01": [1, 4.0], "layer_02": [1, 2.0]}))
    Results({}, tmp_path / "out.json").save("model", {"trained": state})
    resumed = Results({}, tmp_path / "out.json").states("model")["trained"]
    assert resumed.sinks == {"layer_01": [3, 11.5], "layer_02": [1, 2.0]}
    state.clear()
    assert state.sinks == {}
