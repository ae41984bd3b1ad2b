"""What the tokens of a probe have done since the reference: which tokens, against which, and what a resumed run has."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from matent_callbacks import EntropyMonitor, LoopMonitor, untrained_like
from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.functional import sink_tokens
from tests.callbacks.test_run_monitor import run_monitor
from tests.conftest import collate, llama, text_examples
from tests.functional.test_drift import slow_cosine, slow_drift, slow_overlap

METRICS = ("drift", "subspace_overlap", "token_cosine")
LAYERS = ("layer_00", "layer_01", "last")
BATCHES = [collate(text_examples(3)), collate(text_examples(4, start=3))]
# A token that is there once.
RARE = next(int(t) for t in BATCHES[0]["input_ids"][1] if sum(int((b["input_ids"] == t).sum()) for b in BATCHES) == 1)


@pytest.fixture
def model() -> Any:
    return llama(layers=2, dropout=0.0)


def changed(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)


def drift_monitor(**arguments: Any) -> Any:
    return run_monitor(2, **({"layers": "all", "metrics": METRICS, "probe": BATCHES, "reference": "start"} | arguments))


def drifted(model: Any, *, before: Any = None, change: Any = changed, **arguments: Any) -> dict[str, float]:
    """What is logged once a model has changed since training began."""
    monitor = drift_monitor(**arguments)
    monitor.watch(model)
    monitor.run_begins(model)
    change(model)
    values = monitor.step_ends(model, 2, at=2)[2]
    return {key: value for key, value in values.items() if "diff_erank" not in key}


@torch.no_grad()
def states_of(model: Any, batches: Any = BATCHES) -> dict[str, list[tuple[Any, Any]]]:
    """By layer, hidden states and mask of each batch."""
    found: dict[str, list[tuple[Any, Any]]] = {layer: [] for layer in LAYERS}
    model.eval()
    for batch in batches:
        states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        for layer, own in zip(LAYERS, states, strict=True):
            found[layer].append((own, batch["attention_mask"].bool()))
    return found


def expected(before: Any, now: Any, most: int = 2048) -> dict[str, float]:
    """By the definitions: of all tokens that the masks have, evenly spaced ones, without sinks of either side."""
    values = {}
    for layer in LAYERS:
        tokens = [[], []]
        for side, batches in enumerate((before, now)):
            for states, mask in batches[layer]:
                sinks = sink_tokens(states, mask)
                tokens[side] += list(zip(states[mask], (~sinks)[mask].tolist(), strict=True))
        count = len(tokens[0])
        chosen = [i * count // min(most, count) for i in range(min(most, count))]
        x, y = (
            torch.stack([tokens[side][i][0] for i in chosen if tokens[0][i][1] and tokens[1][i][1]]) for side in (0, 1)
        )
        values |= {
            f"drift/{layer}": slow_drift(x, y).item(),
            f"subspace_overlap/{layer}": slow_overlap(x, y).item(),
            f"token_cosine/{layer}": slow_cosine(x, y).item(),
        }
    return values


@pytest.mark.parametrize("most", [2048, 70, 12])
def test_against_the_definitions(model, most):
    before = states_of(model)
    found = drifted(model, drift_tokens=most)
    assert found == pytest.approx(expected(before, states_of(model), most), abs=1e-5)
    assert found["drift/last"] > 0.001


def test_nothing_has_moved_at_the_start_and_a_rotation_is_seen(model):
    found = drifted(model, change=lambda model: None)
    start = {"drift": 0, "subspace_overlap": 1, "token_cosine": 1}
    assert found == pytest.approx({f"{name}/{layer}": start[name] for name in METRICS for layer in LAYERS}, abs=1e-6)


def test_a_token_that_is_a_sink_on_one_side_is_left_out(model):
    def make_a_sink(model: Any) -> None:
        changed(model)
        with torch.no_grad():
            model.model.embed_tokens.weight[RARE] *= 50

    before = states_of(model)
    with pytest.warns(UserWarning, match="Attention sinks"):
        found = drifted(model, change=make_a_sink)
    now = states_of(model)
    assert any(sink_tokens(states, mask).any() for states, mask in now["layer_00"])
    assert found == pytest.approx(expected(before, now), abs=1e-5)
    again = llama(layers=2, dropout=0.0)
    make_a_sink(again)
    with pytest.warns(UserWarning, match="Attention sinks"):
        back = drifted(again, change=lambda model: model.load_state_dict(llama(layers=2, dropout=0.0).state_dict()))
    assert back == pytest.approx(expected(now, before), abs=1e-5)


def test_sinks_of_the_reference_and_of_the_probe_are_told_once(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[BATCHES[0]["input_ids"][0, 0]] *= 100
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drifted(model, metrics=("effective_rank", "drift"))
    assert len([w for w in caught if "Attention sinks" in str(w.message)]) == 1


def test_padding_and_the_split_of_the_probe_change_nothing():
    examples = text_examples(6)
    probes = {
        "one": collate(examples),
        "left": collate(examples, side="left"),
        "split": [collate(examples[:1]), collate(examples[1:])],
    }
    found = {
        name: drifted(llama(layers=2, dropout=0.0), probe=probe, drift_tokens=40) for name, probe in probes.items()
    }
    assert found["split"] == pytest.approx(found["one"], abs=1e-5)
    assert found["left"] == pytest.approx(found["one"], abs=1e-4)


def test_each_probe_has_its_own_reference_and_other_tokens_count_only_in_the_loss(model):
    alone = drifted(copy.deepcopy(model), probe=BATCHES[1])
    both = drifted(copy.deepcopy(model), probe={"a": BATCHES[0], "b": BATCHES[1]})
    assert {key[2:]: value for key, value in both.items() if key.startswith("b/")} == alone
    assert both["a/drift/last"] != both["b/drift/last"]
    labelled = {**BATCHES[1], "labels": BATCHES[1]["labels"].clone()}
    labelled["labels"][:, :8] = -100
    response = drifted(copy.deepcopy(model), probe=labelled, tokens="labels")
    before = {layer: [(s, labelled["labels"] != -100)] for layer, [(s, _)] in states_of(model, [labelled]).items()}
    changed(model)
    now = {layer: [(s, labelled["labels"] != -100)] for layer, [(s, _)] in states_of(model, [labelled]).items()}
    assert response == pytest.approx(expected(before, now), abs=1e-5)


def test_only_what_is_asked_for_is_logged_and_evaluation_has_none_of_it(model):
    monitor = drift_monitor(metrics="drift", layers="last", background=True)
    monitor.watch(model)
    monitor.run_begins(model)
    monitor.evaluation_begins()
    monitor.evaluation_batch_begins(model)
    model(**BATCHES[0])
    monitor.batch_ends()
    assert monitor.evaluation_ends(model) == {}
    assert monitor.step_ends(model, 2, at=2) == {}
    assert monitor.late_values() == {2: {"drift/last": pytest.approx(0, abs=1e-9), "diff_erank/last": 0.0}}


def test_other_models_as_the_reference(model):
    other = untrained_like(model, seed=3)
    before = states_of(other)
    found = drifted(model, reference=other, solver="approximate", metrics=(*METRICS, "effective_rank"))
    now = expected(before, states_of(model))
    assert {key: found[key] for key in now} == pytest.approx(now, abs=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: llama(layers=1), "same layers: it has no layer_01"),
        (lambda: llama(layers=2, hidden=16), "same layers: one has 16 features, the other 32"),
    ],
)
def test_a_reference_with_other_layers_or_widths(model, other, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        drifted(model, reference=other())


def test_with_peft_the_reference_of_the_start_has_the_adapter_on(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    before = states_of(adapted)
    with adapted.disable_adapter():
        base = states_of(adapted)
    found = drifted(adapted)
    now = states_of(adapted)
    assert found == pytest.approx(expected(before, now), abs=1e-5)
    assert abs(found["drift/last"] - expected(base, now)["drift/last"]) > 1e-3


def test_it_needs_a_reference_and_a_probe(model):
    for arguments in ({"reference": None}, {"reference": None, "probe": None}):
        with pytest.raises(ValueError, match="'drift', which compares with a reference: it needs `reference`, 'start'"):
            drift_monitor(**arguments)
    with pytest.raises(ValueError, match=r"'drift', which compares .* the callbacks and LoopMonitor take it"):
        EntropyMonitor(model, metrics=("effective_rank", "drift"))
    for wrong in (3, 2.5, True, None):
        with pytest.raises(ValueError, match=f"`drift_tokens` must be a whole number of at least 4, got {wrong}"):
            drift_monitor(drift_tokens=wrong)


def test_too_few_tokens_are_told(model):
    few = {key: value[:1, :3] for key, value in BATCHES[0].items()}
    with pytest.warns(UserWarning, match="at least 4 tokens valid in the reference and now, and 3 came"):
        found = drifted(model, probe=few, layers="last", metrics=METRICS)
    assert [name for name in METRICS if found[f"{name}/last"] != found[f"{name}/last"]] == ["drift"]


def test_the_states_on_the_host_have_the_dtype_of_the_model_and_none_is_left_on_the_model(model):
    monitor = drift_monitor(drift_tokens=30)
    model = model.to(torch.bfloat16)
    monitor.watch(model)
    monitor.run_begins(model)
    (comparison,) = monitor._measurement._drift.comparisons.values()
    assert {tokens.states.dtype for tokens in comparison.reference.values()} == {torch.bfloat16}
    assert {tuple(tokens.states.shape) for tokens in comparison.reference.values()} == {(30, 32)}


def resumed(model: Any, state: Any, folder: Path | None, **arguments: Any) -> dict[str, float]:
    monitor = drift_monitor(**arguments)
    monitor._measurement._drift._guard = Guard("test", "warn")
    monitor.load_state_dict(json.loads(json.dumps(state)))
    monitor.watch(model)
    monitor.run_begins(model, step=2, directory=folder)
    monitor.save_reference()
    return monitor.step_ends(model, 4, at=4)[4]


@pytest.fixture
def saved(model, tmp_path) -> Any:
    """The state of a run, and what it logs at its next step."""
    monitor = drift_monitor(drift_tokens=60)
    monitor.watch(model)
    monitor.run_begins(model, directory=tmp_path / "one")
    monitor.save_reference()
    changed(model)
    state = monitor.state_dict()
    return state, monitor.step_ends(model, 2, at=2)[2]


def test_a_resumed_run_has_the_same_reference(model, saved, tmp_path):
    state, values = saved
    files = sorted((tmp_path / "one/matent_reference").iterdir())
    assert len(files) == len(LAYERS)
    assert {path.suffix for path in files} == {".safetensors"}
    assert resumed(model, state, tmp_path / "one", drift_tokens=60) == values
    assert sorted((tmp_path / "one/matent_reference").iterdir()) == files
    # Into another folder, which has it from then on; the order of the batches is that of the start.
    again = resumed(model, state, tmp_path / "two", drift_tokens=60, probe=BATCHES[::-1])
    assert again == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert [path.name for path in sorted((tmp_path / "two/matent_reference").iterdir())] == [p.name for p in files]


@pytest.mark.parametrize("spoil", ["gone", "cut", "of another run"])
def test_where_a_file_is_gone_the_layer_is_left_out_with_one_sentence(model, saved, tmp_path, spoil):
    state, values = saved
    digest = state["reference_tokens"][""]["layers"]["layer_01"] % 2**64
    path = tmp_path / f"one/matent_reference/{digest:016x}.safetensors"
    if spoil == "gone":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(next(p for p in path.parent.iterdir() if p != path).read_bytes())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = resumed(model, state, tmp_path / "one", drift_tokens=60)
    assert re.search(r"resumed without drift of layer_01, .*its hidden states .* are not in", str(told[-1].message))
    assert len(told) == 1 + (spoil == "cut")
    assert found == {key: value for key, value in values.items() if "layer_01" not in key or "diff_erank" in key}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"drift_tokens": 50}, "of another `drift_tokens`"),
        ({"probe": BATCHES[0]}, "of another `probe`"),
        ({"max_tokens": 90}, "of another `settings`"),
        ({"layers": [0, "last", "*.0.mlp"]}, "drift of model.layers.0.mlp"),
    ],
)
def test_what_the_reference_is_not_of_is_left_out(model, saved, tmp_path, arguments, reason):
    state, _ = saved
    with pytest.warns(UserWarning, match="resumed without") as told:
        found = resumed(model, state, tmp_path / "one", **({"drift_tokens": 60} | arguments))
    (sentence,) = [str(warning.message) for warning in told if "drift" in str(warning.message)]
    assert reason in sentence
    kept = {key for key in found if key.startswith(METRICS)}
    assert kept == (
        {f"{name}/{layer}" for name in METRICS for layer in ("layer_00", "last")} if "layers" in arguments else set()
    )


def test_without_a_folder_nothing_is_written_and_the_sentence_says_so(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = drift_monitor()
    monitor.watch(model)
    monitor.run_begins(model)
    monitor.save_reference()
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="resumed without drift, .*were not saved, since no `reference_dir` was given"):
        assert "drift/last" not in resumed(model, monitor.state_dict(), None)


def test_a_full_disk_does_not_end_a_run(model, tmp_path, monkeypatch):
    monitor = drift_monitor()
    monitor._measurement._drift._guard = Guard("test", "warn")
    monitor.watch(model)
    monitor.run_begins(model, directory=tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left .* Training goes on without the files of the reference"):
        monitor.save_reference()
    assert list((tmp_path / "matent_reference").iterdir()) == []


def test_loops_have_it_too(tmp_path):
    def run(steps: range, state: Any, model: Any) -> tuple[Any, Any]:
        logged: dict[int, Any] = {}
        monitor = LoopMonitor(
            model, 1, "all", log=lambda values, step: logged.update({step: values}), metrics=METRICS, probe=BATCHES,
            reference="start", reference_dir=tmp_path, on_error="raise",
        )  # fmt: skip
        if state is not None:
            monitor.load_state_dict(state)
        for step in steps:
            with monitor.step(step, ends=True):
                model(**BATCHES[0]).loss.backward()
                changed(model, seed=step)
        return logged, monitor.state_dict()

    whole, _ = run(range(1, 5), None, llama(layers=2, dropout=0.0))
    model = llama(layers=2, dropout=0.0)
    first, state = run(range(1, 3), None, model)
    second, _ = run(range(3, 5), state, model)
    assert first | second == whole
    assert whole[4]["drift/layer_01"] > whole[1]["drift/layer_01"] > 0
