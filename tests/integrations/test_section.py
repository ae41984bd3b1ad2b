"""The `matent:` section of a YAML file: the callbacks it asks for, and one sentence for what is wrong in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer

from matent_callbacks import EntropyMonitor
from matent_callbacks.integrations._section import AddedCallbacks, Section
from matent_callbacks.transformers import (
    AlignmentCallback,
    CollapseAlarm,
    MatrixEntropyCallback,
    PlateauStopping,
    ReadingPrinter,
)

TEXTS = ["the cat sat on the mat", "a dog ran", "the mat ran on a cat and a dog"]
PLATEAU = {"monitor": "effective_rank/last", "min_delta": 0.1, "patience": 5}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", *sorted({word for text in TEXTS for word in text.split()})]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", **special)


def test_what_it_holds_are_the_arguments_of_the_callbacks():
    section = yaml.safe_load(
        """
        every_n_steps: 7
        layers: [0, last]
        metrics: rankme
        dtype: float64
        plateau:
          - {monitor: rankme/last, min_delta: 1e-3, patience: 5}
          - {monitor: eval_loss, mode: min, min_delta: 0.01, patience: 3}
        collapse: {relative_to: first, action: stop}
        alignment:
        printer: {metric: rankme}
        """
    )
    made = Section(section).callbacks(None)
    kinds = [MatrixEntropyCallback, AlignmentCallback, PlateauStopping, PlateauStopping, CollapseAlarm, ReadingPrinter]
    assert [type(callback) for callback in made] == kinds
    assert made[0].every_n_steps == 7
    assert made[0]._run._arguments["dtype"] == torch.float64
    assert [callback.monitor for callback in made[2:4]] == ["rankme/last", "eval_loss"]
    assert made[2].observer._settings["min_delta"] == 1e-3
    assert made[4].observer.action == "stop"


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_one_asks_for_the_defaults(empty):
    (callback,) = Section.of({"matent": empty}).callbacks(None)
    assert callback.every_n_steps == MatrixEntropyCallback().every_n_steps


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every_n_step": 5}, "`matent` has no setting 'every_n_step': did you mean 'every_n_steps'?"),
        ({"platau": PLATEAU}, "`matent` has no setting 'platau': did you mean 'plateau'?"),
        ({"collapse": {"flor": 0.1}}, "`matent: collapse` has no setting 'flor': did you mean 'floor'?"),
        ({"collapse": {"xyz": 0.1}}, "`matent: collapse` has no setting 'xyz': it has monitor, floor, patience, "),
        ({"plateau": None}, "`matent: plateau` needs `monitor` and `min_delta` and `patience`."),
        ({"plateau": [PLATEAU, {"monitor": "loss"}]}, "`matent: plateau` needs `min_delta` and `patience`."),
        ({"every_n_steps": "often"}, "In `matent`: `every_n_steps` must be a whole number above 0, got 'often'."),
        ({"metrics": "rank"}, "In `matent`: "),
        ({"plateau": PLATEAU | {"mode": "up"}}, "In `matent: plateau`: `mode` must be one of max, min, any, got 'up'."),
        ({"pictures": "no"}, "`matent: pictures` must be true or false, got 'no'."),
        ({"mask": "attention_mask"}, "`matent: mask` can only be given in Python."),
        ({"alignment": {"probe": TEXTS}}, "`matent: alignment: probe` can only be given in Python."),
        ({"reference": 3, "probe": TEXTS}, "`matent: reference` can only be 'start' here, got 3."),
        ({"reference": "start"}, "In `matent`: "),
        ({"probe": "missing.txt"}, "`matent: probe` is the file 'missing.txt', which does not exist."),
        ({"probe": []}, "`matent: probe` must be a text file with one text a line, a list of texts, or a mapping"),
        (
            {"probe": {"english": [3]}},
            "`matent: probe` must be a text file with one text a line, a list of texts, or a mapping",
        ),
        ([], "`matent` must hold settings, such as `every_n_steps: 50`, got []."),
        ({"collapse": 3}, "`matent: collapse` must hold settings, such as `every_n_steps: 50`, got 3."),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_one_sentence(section, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Section(section)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "near"), [("Matent", " Is 'Matent' meant to be it?"), ("stage", "")])
def test_a_file_without_one_is_told_of(name, near):
    message = f"There is no `matent:` section, such as `matent: {{every_n_steps: 50, layers: all}}`.{near}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Section.of({name: {}, "do_train": True})


@pytest.mark.parametrize("special", [{}, {"pad_token": "[PAD]"}], ids=["no padding token", "padding token"])
@pytest.mark.parametrize("as_file", [True, False])
def test_texts_are_a_probe_by_the_tokenizer_of_the_run(
    special, as_file, make_llama, make_trainer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    section = Section({"every_n_steps": 2, "probe": "texts.txt" if as_file else TEXTS, "reference": "start"})
    model = make_llama()
    own = tokenizer(**special)

    class WithTokenizer(Trainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, processing_class=own)

    trainer = make_trainer([AddedCallbacks(section)], model=model, cls=WithTokenizer)
    trainer.train()
    logged = {r["step"]: r for r in trainer.state.log_history if "effective_rank/last" in r}
    assert sorted(logged) == [2, 4, 6]
    assert "diff_erank/last" in logged[6]

    monitor = EntropyMonitor(model)
    monitor.read([{"input_ids": torch.tensor([own.convert_tokens_to_ids(text.split())])} for text in TEXTS])
    assert logged[6]["effective_rank/last"] == pytest.approx(monitor.compute()["effective_rank/last"], rel=1e-4)


def test_a_long_text_is_cut():
    (callback,) = Section({"probe": {"long": ["cat " * 700]}}).callbacks(tokenizer(pad_token="[PAD]"))
    (batch,) = callback._run._measurement.probes["long/"]
    assert batch["input_ids"].shape == (1, 512)


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="`matent: probe` needs a tokenizer, and the Trainer has none"):
        Section({"probe": TEXTS}).callbacks(None)


def test_all_callbacks_come_to_the_trainer_once_it_is_made(make_trainer):
    section = Section({"every_n_steps": 1, "plateau": [PLATEAU, PLATEAU | {"monitor": "loss", "mode": "min"}]})
    trainer = make_trainer([AddedCallbacks(section)], max_steps=8)
    trainer.train()
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert kinds[:3] == ["MatrixEntropyCallback", "PlateauStopping", "PlateauStopping"]
    assert kinds.count("AddedCallbacks") == 1
    assert {"plateau/loss", "plateau/effective_rank/last"} <= set(trainer.state.log_history[-2])


def test_it_is_announced_once_in_one_line(capsys, monkeypatch):
    section = Section({"every_n_steps": 5, "collapse": {"floor": 0.1}})
    section.announce()
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"matent_callbacks [\d.]+: MatrixEntropyCallback\(every_n_steps=5\), CollapseAlarm\(floor=0.1\)\n", line
    )
    monkeypatch.setenv("RANK", "1")
    section.announce()
    assert not capsys.readouterr().out


def test_no_framework_is_imported_with_the_package():
    code = "import sys, matent_callbacks.integrations; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"axolotl", "swift", "llamafactory", "torch", "transformers"} & set(loaded)
