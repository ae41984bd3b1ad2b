"""Results of ``matent measure`` whose model or text is another one by the time that the command is run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks.cli import _fingerprints, _measure_models
from matent_callbacks.cli._app import run
from matent_callbacks.cli._fingerprints import fingerprint
from tests.cli.models import documents, last, measured, save_adapter, save_model, write_lines
from tests.cli.test_measure import stdin_of

LINES = documents(530)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "documents.txt", LINES[:30])


def erank(content: dict[str, Any], index: int = 0) -> float:
    value: float = last(content, index)["sequence_effective_rank"]["value"]
    return value


def test_a_finished_model_whose_weights_have_changed_is_measured_anew(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_model(tmp_path / "model", "llama"), tmp_path / "out.json"
    before = measured(out, folder, "--text", text)
    save_model(folder, "llama", seed=1)
    capsys.readouterr()
    after = measured(out, folder, "--text", text)
    assert f"{folder} has changed since it was measured for {out}, and is measured anew." in capsys.readouterr().err
    assert after["models"] == measured(tmp_path / "other.json", folder, "--text", text)["models"]
    assert abs(erank(after) - erank(before)) > 1e-3
    # What does not change the numbers is no change.
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    (folder / "README.md").write_text("read me")
    (folder / "model.safetensors").touch()
    capsys.readouterr()
    assert measured(out, folder, "--text", text) == after
    assert f"{folder} is in {out} already." in capsys.readouterr().err


def interrupted(monkeypatch: pytest.MonkeyPatch, *arguments: object, batch: int = 8) -> None:
    class Stop(_measure_models.Interruption):
        batches = 0

        def hold(self) -> Any:
            self.batches += 1
            if self.batches == batch:
                raise KeyboardInterrupt
            return super().hold()

    with monkeypatch.context() as patched:
        patched.setattr(_measure_models, "Interruption", Stop)
        assert run(["measure", *map(str, arguments)]) == 130


def test_an_interrupted_measurement_does_not_go_on_with_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_lines(tmp_path / "long.txt", LINES)
    folder, out = save_model(tmp_path / "model", "t5"), tmp_path / "out.json"
    arguments = (folder, "--text", text, "--batch-tokens", 8000)
    interrupted(monkeypatch, *arguments, "--out", out)
    assert "_in_progress" in json.loads(out.read_text())
    save_model(folder, "t5", seed=1)
    capsys.readouterr()
    resumed = measured(out, *arguments)
    said = f"{folder} has changed since its measurement was interrupted, and is measured anew."
    assert said in capsys.readouterr().err
    assert resumed["models"] == measured(tmp_path / "whole.json", *arguments)["models"]


def test_an_untrained_twin_is_not_measured_on_another_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_lines(tmp_path / "text.txt", LINES[:30])
    folder, out = save_model(tmp_path / "model", "t5"), tmp_path / "out.json"
    arguments = (folder, "--text", text, "--batch-tokens", 100000, "--untrained", "--out", out)
    # One batch and the end of the window of the model itself are done.
    interrupted(monkeypatch, *arguments, batch=3)
    assert json.loads(out.read_text())["_in_progress"][str(folder)]["trained"]["complete"]
    text.write_text(text.read_text().swapcase())
    assert run(["measure", *map(str, arguments)]) == 1
    assert "--text is not what it was when this measurement was interrupted" in capsys.readouterr().err


def test_a_text_with_other_contents_and_as_many_bytes_is_measured_anew(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [save_model(tmp_path / name, "llama", seed=seed) for seed, name in enumerate("ab")]
    out = tmp_path / "out.json"
    before = measured(out, *models, "--text", text)
    text.write_text(text.read_text().swapcase())
    capsys.readouterr()
    after = measured(out, models[0], "--text", text)
    err = capsys.readouterr().err
    assert f"--text is not what it was for {out}, whose results are discarded and measured anew" in err
    assert after["models"] == measured(tmp_path / "other.json", models[0], "--text", text)["models"]
    assert abs(erank(after) - erank(before)) > 1e-3


@pytest.mark.parametrize("most", [None, 20])
def test_stdin_is_compared_as_far_as_it_was_read(
    most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_model(tmp_path / "model", "llama"), tmp_path / "out.json"
    arguments = (folder, "--text", "-", *(() if most is None else ("--max-sequences", most)))

    def measure(lines: list[str]) -> tuple[dict[str, Any], str]:
        # Without a line end at the end.
        stdin_of(monkeypatch, "\n".join(lines).encode())
        capsys.readouterr()
        return measured(out, *arguments), capsys.readouterr().err

    first, _ = measure(LINES[:30])
    same, err = measure(LINES[:30])
    assert f"{folder} is in {out} already." in err
    assert same == first
    longer, err = measure(LINES[:40])
    assert ("--text is not what it was" in err) == (most is None)
    assert (longer == first) == (most is not None)
    other, err = measure(LINES[5:45])
    assert "--text is not what it was" in err
    assert other["models"] != longer["models"]


def test_what_was_compared_with_a_baseline_that_has_changed_is_measured_anew(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model = save_model(tmp_path / "base", "llama"), save_model(tmp_path / "model", "llama", seed=1)
    out = tmp_path / "out.json"
    arguments = (model, "--baseline", base, "--text", text)
    before = measured(out, *arguments)
    save_model(base, "llama", seed=2)
    capsys.readouterr()
    after = measured(out, *arguments)
    said = f"{base} has changed since it was measured for {out}, and is measured anew, and so is what was compared"
    assert said in capsys.readouterr().err
    assert after["models"] == measured(tmp_path / "other.json", *arguments)["models"]
    differences = [
        last(found, 1)["sequence_effective_rank"]["baseline_difference"]["value"] for found in (before, after)
    ]
    assert abs(differences[0] - differences[1]) > 1e-3


def test_results_of_a_release_without_fingerprints_stay_and_that_is_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_model(tmp_path / "model", "llama"), tmp_path / "out.json"
    content = measured(out, folder, "--text", text)
    del content["_origins"]
    out.write_text(json.dumps(content))
    save_model(folder, "llama", seed=1)
    capsys.readouterr()
    assert measured(out, folder, "--text", text)["models"] == content["models"]
    assert "by a release that did not note whether the model or the text has changed since" in capsys.readouterr().err


def test_an_adapter_changes_with_its_base(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out.json"
    before = measured(out, adapter, "--text", text)
    save_model(base, "llama", seed=3)
    after = measured(out, adapter, "--text", text)
    assert abs(erank(after) - erank(before)) > 1e-3


def test_a_large_file_is_told_from_another_by_each_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(_fingerprints, "_WHOLE", 2**10)
    monkeypatch.setattr(_fingerprints, "_BLOCKS", 2)
    monkeypatch.setattr(_fingerprints, "_BLOCK", 2**8)
    tensors = {f"layer.{i}": torch.zeros(500) for i in range(20)}
    marks = set()
    for name in (None, *tensors):
        changed = {key: value + (key == name) for key, value in tensors.items()}
        save_file(changed, tmp_path / "model.safetensors")
        marks.add(fingerprint(str(tmp_path), baseline=None)[str(tmp_path)])
    assert len(marks) == 21
