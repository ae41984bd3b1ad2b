from __future__ import annotations

import gc
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import untrained_like
from matent_callbacks.cli._app import run
from tests.cli.models import WIDTH, documents, last, measured, save_model, save_tokenizer, write_lines
from tests.conftest import slow_entropy, slow_pooled_entropy
from tests.slow import embedding_readings, sequence_readings, slow_lidar, slow_vectors
from tests.versions import needs

KINDS = ("llama", "bert", "t5")
METRICS = "rankme,embedding_effective_rank,embedding_rankme,holevo_information,curvature,lidar"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sharded = {"llama": {"max_shard_size": "40KB"}}
    return {kind: save_model(folder / kind, kind, **sharded.get(kind, {})) for kind in KINDS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "documents.txt", documents(40))


def slow_layers(folder: Path, lines: list[str], *, untrained: bool = False) -> list[list[float]]:
    """The paper's procedure: ``AutoModel``, one sentence at a time, SVD of the covariance; ``[layer][sentence]``."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    if untrained:
        model = untrained_like(model, seed=0)
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    limit = getattr(model.config, "max_position_embeddings", 2048)
    found = []
    for line in lines:
        inputs = tokenizer(line, return_tensors="pt", truncation=True, max_length=limit)
        with torch.no_grad():
            outputs = part(input_ids=inputs["input_ids"], output_hidden_states=True)
        states = [*outputs.hidden_states[:-1], outputs[0]]
        found.append([slow_entropy(z[0]) for z in states])
    return [list(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_papers_procedure(
    kind: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    arguments = (models[kind], "--text", text, "--layers", "all", "--untrained", "--dtype", "float64")
    content = measured(tmp_path / "out.json", *arguments, "--batch-tokens", 300)
    lines = text.read_text().splitlines()
    trained, before = (slow_layers(models[kind], lines, untrained=u) for u in (False, True))
    (entry,) = content["models"]
    assert list(entry["layers"]) == ["layer_00", "layer_01", "last"]
    for name, own, other in zip(entry["layers"], trained, before, strict=True):
        found = {key: quantity["value"] for key, quantity in entry["layers"][name].items()}
        mean, start = sum(own) / len(own), sum(other) / len(other)
        assert found == pytest.approx(
            {
                "sequence_matrix_entropy": mean,
                "normalized_sequence_matrix_entropy": mean / math.log(WIDTH),
                "sequence_effective_rank": math.exp(mean),
                "untrained_sequence_matrix_entropy": start,
                "untrained_sequence_effective_rank": math.exp(start),
                "diff_erank": math.exp(start) - math.exp(mean),
            },
            abs=1e-7,
        )
    assert abs(last(content)["diff_erank"]["value"]) > 1e-3
    assert entry["num_sequences"] == len(lines)
    assert entry["hidden_size"] == WIDTH
    assert entry["skipped"] == {}


def test_counts_are_those_of_automodel(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    (entry,) = measured(tmp_path / "out.json", models["llama"], "--text", text)["models"]
    assert entry["parameters"] == AutoModel.from_pretrained(models["llama"]).num_parameters()
    tokens = AutoTokenizer.from_pretrained(models["llama"])(text.read_text().splitlines())["input_ids"]
    assert entry["num_tokens"] == sum(min(len(ids), 128) for ids in tokens)
    assert entry["steps"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_change_the_values(kind: str, models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    one = measured(tmp_path / "one.json", models[kind], "--text", text, "--batch-tokens", 1)
    many = measured(tmp_path / "many.json", models[kind], "--text", text, "--batch-tokens", 2000)
    for name, quantity in last(one).items():
        assert last(many)[name] == pytest.approx(quantity, abs=1e-4)


def test_pooled_metrics(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    content = measured(tmp_path / "out.json", models["t5"], "--text", text, "--metrics", "matrix_entropy,rankme")
    tokenizer, model = AutoTokenizer.from_pretrained(models["t5"]), AutoModel.from_pretrained(models["t5"])
    states = []
    for line in text.read_text().splitlines():
        with torch.no_grad():
            states.append(model.get_encoder()(tokenizer(line, return_tensors="pt")["input_ids"])[0])
    longest = max(z.shape[1] for z in states)
    padded = torch.cat([torch.nn.functional.pad(z, (0, 0, 0, longest - z.shape[1])) for z in states])
    mask = torch.tensor([[i < z.shape[1] for i in range(longest)] for z in states])
    expected = {"value": pytest.approx(slow_pooled_entropy(padded, mask), abs=1e-4), "low": None, "high": None}
    assert last(content)["matrix_entropy"] == expected
    assert last(content)["rankme"]["value"] > 1


@pytest.mark.parametrize("embedding", ["mean", "last", "first"])
def test_quantities_of_sequences_and_their_embeddings(
    embedding: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    names = ("embedding_matrix_entropy", "embedding_rankme", "holevo_information", "curvature", "lidar")
    content = measured(
        tmp_path / "out.json",
        *(models["llama"], "--text", text, "--metrics", ",".join(names), "--embedding", embedding),
        *("--batch-tokens", 700, "--dtype", "float64"),
    )
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    model = AutoModel.from_pretrained(models["llama"], dtype=torch.float64)
    states = []
    for line in text.read_text().splitlines():
        inputs = tokenizer(line, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            states.append(model(input_ids=inputs["input_ids"])[0])
    batches = [(z, torch.ones(z.shape[:2], dtype=torch.bool)) for z in states]
    expected = sequence_readings(batches) | embedding_readings(slow_vectors(batches, embedding))
    expected["lidar"] = slow_lidar(batches)
    for name in names:
        value = {"value": pytest.approx(expected[name], rel=1e-6), "low": None, "high": None}
        assert last(content)[name] == value, name
    assert content["settings"]["embedding"] == embedding


def test_layers_that_give_one_vector_a_document(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **shape)).eval()
    model.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    arguments = (tmp_path / "bert", "--text", text, "--untrained", "--layers")
    names = ("embedding_rankme", "embedding_matrix_entropy")
    content = measured(tmp_path / "out.json", *arguments, "last,pooler", "--metrics", ",".join(names))
    (entry,) = content["models"]
    tokenizer, vectors = AutoTokenizer.from_pretrained(tmp_path / "bert"), []
    for line in text.read_text().splitlines():
        inputs = tokenizer(line, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            vectors.append(model(input_ids=inputs["input_ids"]).pooler_output[0].double())
    expected = embedding_readings(torch.stack(vectors))
    assert list(entry["layers"]) == ["last", "pooler"]
    assert {name: of["value"] for name, of in entry["layers"]["pooler"].items()} == {
        # Roots of the smallest eigenvalues are as float32 has them.
        name: pytest.approx(expected[name], rel=1e-3)
        for name in names
    }
    assert {*names, "diff_erank"} < entry["layers"]["last"].keys()
    alone = measured(tmp_path / "alone.json", *arguments, "pooler", "--metrics", ",".join(names))
    assert alone["models"][0]["layers"]["pooler"] == entry["layers"]["pooler"]
    assert alone["models"][0]["num_sequences"] == len(vectors)
    assert run(["measure", *map(str, arguments), "pooler", "--metrics", "rankme"]) == 1
    assert "pooler, which gives one vector a document: --metrics must name a quantity of" in capsys.readouterr().err


def test_interval_is_that_of_a_mean(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    content = measured(tmp_path / "out.json", models["bert"], "--text", text)
    entropies = torch.tensor(slow_layers(models["bert"], text.read_text().splitlines())[-1])
    error = float(entropies.std() / len(entropies) ** 0.5)
    found = last(content)["sequence_matrix_entropy"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found["low"] < found["value"] < found["high"]
    rank = last(content)["sequence_effective_rank"]
    assert rank["low"] == pytest.approx(math.exp(found["low"]), rel=1e-3)


def test_diff_erank_of_a_model_with_itself_has_no_spread() -> None:
    from matent_callbacks.cli._entries import interval, layer_samples
    from matent_callbacks.cli._state import State, draws, weighted_sums

    values, counts = torch.rand(30).double().numpy(), draws(0, range(30))
    states = []
    for part in (slice(0, 30), slice(None, None, -1)):
        states.append(State(widths={"last": 8}, means={"last": weighted_sums(values[part], counts[part])}))
    found = interval(layer_samples(*states, [])["last"]["diff_erank"])
    assert found == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-9)


def stdin_of(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_file_folder_json_and_stdin_are_the_same_text(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = text.read_text().splitlines()
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    write_lines(folder / "a.txt", lines[:10])
    write_lines(folder / "b" / "c.txt", lines[10:])
    write_lines(folder / ".hidden", ["not to be read"])
    records = write_lines(tmp_path / "records.jsonl", [json.dumps({"id": 1, "body": line}) for line in lines])
    # Two models and their untrained twins: stdin is read four times.
    arguments = (models["llama"], models["t5"], "--untrained")
    stdin_of(monkeypatch, text.read_bytes())
    results = [
        measured(tmp_path / "file.json", *arguments, "--text", text),
        measured(tmp_path / "folder.json", *arguments, "--text", folder),
        measured(tmp_path / "records.json", *arguments, "--text", records, "--field", "body"),
        measured(tmp_path / "stdin.json", *arguments, "--text", "-"),
    ]
    assert all(content["models"] == results[0]["models"] for content in results)
    assert len(results[0]["models"]) == 2


def test_trouble_is_counted_told_once_and_left_out(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = documents(30)
    lines = [json.dumps({"text": line}).encode() for line in good]
    lines[3:3] = [b'{"text": "cut of', b'{"other": 1}', b'{"text": 7}', b"[1]"]
    lines[9:9] = [b"", b'{"text": "  "}', b'{"text": "a"}', "caf\xe9".encode("latin-1")]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    clean = measured(tmp_path / "clean.json", models["llama"], "--text", write_lines(tmp_path / "good.txt", good))
    assert (
        capsys.readouterr().err
        == f"matent: {models['llama']} takes 128 tokens at most: longer documents are cut there.\n"
    )
    arguments = ("--text", tmp_path / "bad.jsonl", "--field", "text", "--max-length", 128)
    content = measured(tmp_path / "bad.json", models["llama"], *arguments)
    (entry,) = content["models"]
    assert entry["skipped"] == {"damaged": 4, "empty": 2, "one_token": 1, "not_utf8": 1}
    assert entry["num_sequences"] == len(good)
    values = [last(c)["sequence_matrix_entropy"]["value"] for c in (clean, content)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    assert any(
        "4 lines are not JSON with a string in that field and are left out (first: line 4 of" in line for line in told
    )


def test_text_in_another_encoding_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text" / "a.txt", documents(5))
    (tmp_path / "text" / "b.txt").write_text("\n".join(documents(9)), encoding="utf-16")
    (tmp_path / "text" / "c.txt").write_text("\n".join(documents(5)), encoding="utf-8-sig")
    (entry,) = measured(tmp_path / "out.json", models["t5"], "--text", tmp_path / "text")["models"]
    assert entry["skipped"] == {"not_utf8": 9}
    assert entry["num_sequences"] == 10


def test_max_sequences_counts_what_is_measured(models: dict[str, Path], tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.txt", ["", *documents(8)[:3], "", *documents(8)[3:], ""])
    (entry,) = measured(tmp_path / "out.json", models["t5"], "--text", text, "--max-sequences", 4)["models"]
    assert entry["num_sequences"] == 4
    assert entry["skipped"] == {"empty": 2}


def test_sequences_that_are_not_finite_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_model(tmp_path / "model", "t5")
    lines = documents(12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [set(tokenizer(line)["input_ids"]) for line in lines]
    token = next(t for t in sorted(ids[0]) if 0 < sum(t in own for own in ids) < 6)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    model.save_pretrained(folder)
    kept = [line for line, own in zip(lines, ids, strict=True) if token not in own]
    arguments = ("--layers", "0,last", "--batch-tokens", 500)
    broken = measured(tmp_path / "a.json", folder, "--text", write_lines(tmp_path / "a.txt", lines), *arguments)
    clean = measured(tmp_path / "b.json", folder, "--text", write_lines(tmp_path / "b.txt", kept), *arguments)
    assert broken["models"][0]["skipped"] == {"nonfinite": len(lines) - len(kept)}
    assert broken["models"][0]["num_tokens"] == clean["models"][0]["num_tokens"]
    values = [last(c)["sequence_matrix_entropy"]["value"] for c in (broken, clean)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert "gave NaN or Inf and are left out" in capsys.readouterr().err


def test_models_that_cannot_be_measured_do_not_keep_others_from_it(
    models: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = save_model(tmp_path / "empty", "bert")
    (empty / "model.safetensors").unlink()
    foreign = save_model(tmp_path / "foreign", "bert")
    (foreign / "model.safetensors").write_bytes((models["t5"] / "model.safetensors").read_bytes())
    cut = save_model(tmp_path / "cut", "llama", max_shard_size="40KB")
    sorted(cut.glob("*.safetensors"))[0].unlink()
    capsys.readouterr()
    content = measured(tmp_path / "out.json", empty, foreign, cut, models["t5"], "--text", text, code=1)
    assert [entry["model"] for entry in content["models"]] == [str(models["t5"])]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].endswith("has no weights: there is no .safetensors file in it.")
    assert "has no weight of BertModel" in told[1]
    assert str(cut) in told[2]


def test_pickled_weights_are_loaded_only_on_request(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    folder = save_model(tmp_path / "model", "bert")
    expected = measured(tmp_path / "safe.json", folder, "--text", text)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    assert run(["measure", str(folder), "--text", str(text)]) == 1
    assert "pass --allow-pickle" in capsys.readouterr().err
    assert measured(tmp_path / "out.json", folder, "--text", text, "--allow-pickle")["models"] == expected["models"]


def test_models_of_the_hub_obey_the_same_rules(text: Path, tmp_path: Path) -> None:
    """A hub cache as ``huggingface_hub`` leaves it, without a network."""
    from safetensors.torch import load_file

    for name in ("safe", "pickled"):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        save_model(repository / "snapshots" / ("0" * 40), "bert")
    weights = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    out = tmp_path / "out.json"
    arguments = ["measure", "someone/pickled", "someone/safe", "--text", str(text), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "matent_callbacks", *arguments],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    refused, _ = done.stderr.splitlines()
    assert refused.startswith("matent: someone/pickled has no .safetensors file"), refused
    assert [entry["model"] for entry in json.loads(out.read_text())["models"]] == ["someone/safe"]


def test_no_code_of_a_model_runs_unless_trusted(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_model(tmp_path / "model", "bert")
    ran = tmp_path / "ran"
    code = f"import pathlib, transformers\npathlib.Path({str(ran)!r}).touch()\n"
    (folder / "own.py").write_text(f"{code}class OwnConfig(transformers.BertConfig):\n    model_type = 'own'\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert run(["measure", str(folder), "--text", str(text)]) == 1
    assert "pass --trust-remote-code" in capsys.readouterr().err
    assert not ran.exists()
    run(["measure", str(folder), "--text", str(text), "--trust-remote-code"])
    assert ran.exists()


@pytest.mark.parametrize(
    "key", ["_attn_implementation", pytest.param("attn_implementation", marks=needs("transformers", "5.0"))]
)
def test_kernels_that_a_config_asks_for_are_code_too(
    key: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "someone/kernel"}))
    assert run(["measure", str(folder), "--text", str(text)]) == 1
    assert "wants to run code of someone/kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--text"),
        (["--text", "nowhere.txt"], "there is no nowhere.txt"),
        (["--text", "{text}", "--max-length", "1"], "--max-length"),
        (["--text", "{text}", "--dtype", "float8"], "float8"),
        (["--text", "{text}", "--device", "abacus"], "--device must be one that is here, got 'abacus'"),
        (["--text", "{text}", "--metrics", "rank_me"], "Near: rankme"),
        (["--text", "{text}", "--embedding", "cls"], "--embedding"),
        (["--text", "{text}", "--layers", "enc"], "no module of the model matches it"),
        (["--text", "{text}", "--layers", "9"], "the model has 2 blocks"),
        (["--text", "{text}", "--out", "no/such/out.json"], "there is no such folder"),
        (["--text", "{text}", "--out", "{text}"], "was not written by `matent measure`"),
        (["--text", "{folder}"], "--field must name the field"),
        (["./no/such/model", "--text", "{text}"], "./no/such/model is no folder"),
        (["--text", "{text}", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_arguments_give_one_sentence_and_2(
    arguments: list[str],
    told: str,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lines(tmp_path / "a.jsonl", ["{}"])
    before = text.read_text()
    filled = [argument.format(text=text, folder=tmp_path) for argument in arguments]
    assert run(["measure", str(models["t5"]), *filled]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
    assert text.read_text() == before


def test_other_settings_do_not_go_on_in_the_same_file(
    models: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    measured(out, models["t5"], "--text", text, "--max-length", 50)
    before = out.read_bytes()
    assert run(["measure", str(models["t5"]), "--text", str(text), "--seed", "1", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "--max-length was 50 and is 2048; --seed was 0 and is 1" in err
    assert out.read_bytes() == before


def test_finished_models_are_not_measured_again(
    models: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    first = measured(out, models["t5"], "--text", text)
    capsys.readouterr()
    both = measured(out, models["t5"], models["bert"], "--text", text)
    assert f"{models['t5']} is in {out} already" in capsys.readouterr().err
    assert both["models"][:1] == first["models"]
    assert [entry["model"] for entry in both["models"]] == [str(models["t5"]), str(models["bert"])]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_and_started_again_equals_uninterrupted(
    number: signal.Signals, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "".join(f"{line}\n" for line in ["", *documents(700), *documents(700)]).encode()
    arguments = [models["t5"], "--text", "-", "--untrained", "--metrics", METRICS, "--batch-tokens", 4000]
    out = tmp_path / "out.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "matent_callbacks", "measure", *map(str, arguments), "--out", str(out)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    # The first window, and part of the second: it waits for more.
    process.stdin.write(b"".join(content.splitlines(keepends=True)[:600]))
    process.stdin.flush()
    while not out.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    if number == signal.SIGTERM:
        time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), err
    partial = json.loads(out.read_text())
    assert partial["models"] == []
    assert 0 < partial["_in_progress"][str(models["t5"])]["trained"]["sequences"] < 700
    stdin_of(monkeypatch, content)
    resumed = measured(out, *arguments)
    stdin_of(monkeypatch, content)
    assert resumed == measured(tmp_path / "whole.json", *arguments)
    assert "_in_progress" not in resumed


def test_interrupted_text_must_be_the_same(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matent_callbacks.cli import _measure_models

    arguments = ["measure", str(models["t5"]), "--text", "-", "--out", str(tmp_path / "out.json")]
    lines = [f"{line}\n" for line in documents(530)]

    class Stop(_measure_models.Interruption):
        """Ctrl-C in the second window."""

        batches = 0

        def hold(self) -> Any:
            self.batches += 1
            if self.batches == 8:
                raise KeyboardInterrupt
            return super().hold()

    with monkeypatch.context() as patched:
        patched.setattr(_measure_models, "Interruption", Stop)
        stdin_of(patched, "".join(lines).encode())
        assert run([*arguments, "--batch-tokens", "8000"]) == 130
    stdin_of(monkeypatch, "".join(["other text\n", *lines]).encode())
    assert run([*arguments, "--batch-tokens", "8000"]) == 1
    assert "--text is not what it was" in capsys.readouterr().err


def test_full_disk_is_told_once_and_measuring_goes_on(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matent_callbacks.cli import _measure_models

    monkeypatch.setattr(_measure_models, "_SAVE_EVERY", 0.0)
    out = tmp_path / "out.json"
    before = measured(out, models["t5"], "--text", text, "--batch-tokens", 500)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # more cannot be written to any file
    try:
        arguments = ["--text", str(text), "--batch-tokens", "500", "--out", str(out)]
        code = run(["measure", str(models["bert"]), *arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shown = capsys.readouterr()
    assert code == 1
    assert [line for line in shown.err.splitlines() if "cannot be written" in line] == [
        f"matent: --out {out} cannot be written (File too large); measuring goes on."
    ]
    assert "bert" in shown.out
    assert json.loads(out.read_text()) == before
    assert os.listdir(tmp_path) == ["out.json"]


def test_memory_does_not_grow_with_the_number_of_sequences(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matent_callbacks.cli import _stream

    held = {}
    finish = _stream._finish

    def spy(state: Any, window: Any, **counts: Any) -> None:
        finish(state, window, **counts)
        if state.document in (160, 800):
            gc.collect()
            held[state.document] = tracemalloc.get_traced_memory()[0]

    monkeypatch.setattr(_stream, "_WINDOW", 16)
    monkeypatch.setattr(_stream, "_finish", spy)
    text = write_lines(tmp_path / "text.txt", documents(800))
    tracemalloc.start()
    measured(tmp_path / "out.json", models["t5"], "--text", text, "--metrics", "rankme", "--batch-tokens", 400)
    tracemalloc.stop()
    # The 640 documents between are 110 kB.
    assert held[800] < held[160] + 50_000


def test_steps_and_tokens_of_the_run_it_comes_from(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out, inner = tmp_path / "run", tmp_path / "run" / "checkpoint-5"
    save_model(inner, "t5")
    save_model(out, "t5")
    (out / "trainer_state.json").write_text(json.dumps({"global_step": 9, "num_input_tokens_seen": 0}))
    beside = measured(tmp_path / "beside.json", inner, "--text", text)["models"][0]
    assert (beside["steps"], beside["tokens"]) == (9, None)
    (inner / "trainer_state.json").write_text(json.dumps({"global_step": 5, "num_input_tokens_seen": 1280}))
    both = measured(tmp_path / "out.json", inner, out, "--text", text)["models"]
    assert [(entry["steps"], entry["tokens"]) for entry in both] == [(5, 1280), (9, None)]


def test_progress_is_shown_on_a_terminal_only(
    models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["measure", str(models["t5"]), "--text", str(text), "--batch-tokens", "300"]
    assert run(arguments) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert "95% bootstrap interval" in quiet.out
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take a pipe for a terminal
    assert run(arguments) == 0
    assert "sequences/s" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", "bert")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    capsys.readouterr()
    assert run(["measure", str(folder), "--text", str(text)]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert "has no tokenizer" in told
    save_tokenizer(folder)
    assert run(["measure", str(folder), "--text", str(text)]) == 0
