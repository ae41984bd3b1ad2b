"""Several callbacks and probes of one run, each with a part of the page to itself."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks.plot import series
from matent_callbacks.report import Run, comparison, page, read_run
from matent_callbacks.report._findings import summary
from matent_callbacks.report._keys import Quantity, normalise, parse, parse_all
from tests.conftest import collate, text_examples
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.report.browser import BOTH_WIDTHS, BOXES, assert_fits
from tests.report.test_cli_report import invoke
from tests.versions import require

PROBES = {"english": collate(text_examples(4, start=300)), "german": [collate(text_examples(4, start=400))]}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Trainer with an unnamed callback, two named ones, and two that have a mapping of probes."""
    require("transformers", "5.0")
    from transformers import Trainer, TrainingArguments

    from matent_callbacks.transformers import MatrixEntropyCallback
    from tests.conftest import llama

    folder = tmp_path_factory.mktemp("named") / "run"
    metrics = ("embedding_matrix_entropy", "effective_rank", "spectrum")
    trainer = Trainer(
        model=llama(),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=6,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            report_to=["tensorboard"],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=text_examples(48),
        eval_dataset=text_examples(8, start=48),
        data_collator=collate,
        callbacks=[
            MatrixEntropyCallback(1, layers="all"),
            MatrixEntropyCallback(1, layers="all", name="wide", metrics=metrics),
            MatrixEntropyCallback(2, layers="all", name="train_text", probe=PROBES["english"], reference="start"),
            MatrixEntropyCallback(2, layers="all", probe=PROBES, during_eval=False),
            MatrixEntropyCallback(3, probe=PROBES, name="late"),
        ],
    )
    trainer.train()
    trainer.save_state()
    return folder


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Lightning's CSVLogger of a CLIP with named readings and alignments, validated and tested."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import CSVLogger

    from matent_callbacks.lightning import AlignmentCallback, MatrixEntropyCallback

    examples = clip_examples(32)
    probes = {"first": collate_pairs(examples[:16]), "second": [collate_pairs(examples[16:])]}

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_clip()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(**batch, return_loss=True).loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.model(**batch)

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    data = torch.utils.data.DataLoader(examples, batch_size=8, collate_fn=collate_pairs)
    folder = tmp_path_factory.mktemp("named")
    trainer = pl.Trainer(
        logger=CSVLogger(folder),
        callbacks=[
            AlignmentCallback(1, probe=probes),
            AlignmentCallback(2, probe=probes["first"], name="again"),
            MatrixEntropyCallback(2, layers=["model.text_model.final_layer_norm"], name="texts"),
        ],
        max_steps=4,
        val_check_interval=2,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    module = Module()
    trainer.fit(module, data, [data, data])
    trainer.test(module, data, verbose=False)
    return folder


def parts(text: str) -> dict[str, str]:
    """The page by its headings."""
    found = re.split(r"<h2>(.*?)</h2>", text)
    return dict(zip(map(html.unescape, found[1::2]), found[2::2], strict=True))


def test_each_name_has_a_section_and_the_unnamed_have_what_they_had(hugging_face: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = invoke(hugging_face, "--out", out)
    assert result.exit_code == 0, result.output
    found = parts(out.read_text(encoding="utf-8"))
    # What evaluation reads has no probe in its name.
    names = ["english", "german", "late", "late/english", "late/german", "train_text", "wide"]
    assert [title.removeprefix("Readings named ") for title in found if "named" in title] == names
    heat_maps = ["Effective rank of every layer", "Effective rank: change since the first measurement"]
    expected = {
        "english": ["Matrix entropy", "Effective rank", *heat_maps],
        "late/german": ["Matrix entropy", "Effective rank"],
        "train_text": ["Matrix entropy", "Effective rank", *heat_maps, "Diff-eRank"],
        "wide": [
            "Matrix entropy of sequence embeddings",
            "Effective rank",
            *heat_maps,
            "Spectrum of the last layer",
        ],
    }
    for name, titles in expected.items():
        assert re.findall(r"<h3>(.*?)</h3>", found[f"Readings named {name}"]) == titles
    run = read_run(hugging_face)
    records = [{k: v for k, v in r.items() if not run_name(k)} for r in run.records]
    plain = Run(run.name, run.source, records, settings=run.settings)
    measured = {name: run.named(name).measured for name in ("", "wide", "train_text", "english", "late/german")}
    assert list(measured.values()) == ["training batches"] * 2 + ["a probe"] * 3
    for title, text in parts(page(plain)).items():
        if title not in ("What moved", "About this log", "Everything that was logged"):
            assert found[title] == text
    said = summary(run)
    assert summary(plain) == {topic: sentences for topic, sentences in said.items() if "named" not in topic}
    assert said["Readings named train_text"][-2].startswith("Diff-eRank of the last layer ")
    assert any(s.startswith("Held-out effective rank") for s in said["Readings named wide"])
    ids = re.findall(r' id="(.*?)"', out.read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


def run_name(key: str) -> str:
    quantity = parse(key)
    return quantity.name if quantity else ""


def test_both_logs_of_a_run_have_the_same_readings_under_each_name(hugging_face: Path) -> None:
    run, other = read_run(hugging_face), read_run(hugging_face / "runs")
    assert run.names == other.names
    for name in ("", *run.names):
        keys = run.named(name).keys
        assert keys == other.named(name).keys
        for quantity, key in keys.items():
            if key == "loss":
                continue
            steps, values = series(run.records, key)
            assert run.named(name).curve(quantity) == (steps, values)
            assert other.named(name).curve(quantity).values == pytest.approx(values, rel=1e-6)
    assert run.named("late/german").curve(Quantity("effective_rank", "last")).steps == [3, 6]
    assert run.named("wide").curve(Quantity("effective_rank", "last", "")).steps == [2, 4, 6]
    assert run.curve(Quantity("effective_rank", "last")) != run.named("english").curve(
        Quantity("effective_rank", "last")
    )


def test_names_in_lightning(lightning: Path, tmp_path: Path) -> None:
    run = read_run(lightning)
    assert run.names == ["again", "first", "second", "texts"]
    assert run.named("texts").sources("effective_rank") == [None, "loader 0", "loader 1", "test"]
    assert run.named("texts").places("effective_rank") == ["model.text_model.final_layer_norm"]
    assert run.named("first").sources("alignment") == [None, "", "test"]
    out = tmp_path / "report.html"
    assert invoke(lightning, "--out", out).exit_code == 0
    found = parts(out.read_text(encoding="utf-8"))
    for name in ("again", "first", "second"):
        assert "<h3>Debiased CKA of image and text</h3>" in found[f"Readings named {name}"]
    assert "<h3>Effective rank</h3>" in found["Readings named texts"]


def test_runs_side_by_side_have_their_names(hugging_face: Path, lightning: Path) -> None:
    text = comparison([read_run(hugging_face), read_run(lightning)])
    for title in ("english: Effective rank, last layer", "first: Debiased CKA of image and text"):
        assert f"<h3>{title}</h3>" in text
    ids = re.findall(r' id="(.*?)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("key", "quantity"),
    [
        ("english/matrix_entropy/last", Quantity("matrix_entropy", "last", None, "english")),
        ("train/texts/english/rankme/layer_01", Quantity("rankme", "layer_01", None, "texts/english")),
        ("eval_wide/embedding_matrix_entropy/last", Quantity("embedding_matrix_entropy", "last", "", "wide")),
        ("eval/wide/sequence_matrix_entropy/last", Quantity("sequence_matrix_entropy", "last", "", "wide")),
        ("val_a/b/alignment/cka/dataloader_idx_1", Quantity("alignment", "cka", "loader 1", "a/b")),
        ("train/train/curvature/last", Quantity("curvature", "last", None, "train")),
        ("again/effective_rank/vision_encoder", Quantity("effective_rank", "vision_encoder", None, "again")),
        # These have the names of others in them.
        ("plateau/english/matrix_entropy/last", Quantity("plateau", "english/matrix_entropy/last")),
        ("plateau/effective_rank/last/since_progress", Quantity("plateau", "effective_rank/last/since_progress")),
        ("collapse/english/effective_rank/last", None),
        ("a/b/c/matrix_entropy/last", None),
        ("english/loss", None),
    ],
)
def test_names_of_every_logger_mean_the_same(key: str, quantity: Quantity | None) -> None:
    assert parse(str(normalise(key))) == quantity


def test_a_data_set_is_told_from_a_name_by_the_names_of_training() -> None:
    keys = [f"{name}/rankme/last" for name in ("english", "test_me", "eval_wiki_english", "test_english")]
    assert parse_all([*keys, "eval_wiki_german/rankme/last", "eval_english/rankme/last"]) == {
        Quantity("rankme", "last", None, "english"): "english/rankme/last",
        Quantity("rankme", "last", None, "test_me"): "test_me/rankme/last",
        Quantity("rankme", "last", "wiki", "english"): "eval_wiki_english/rankme/last",
        Quantity("rankme", "last", "test", "english"): "test_english/rankme/last",
        Quantity("rankme", "last", "", "english"): "eval_english/rankme/last",
        Quantity("rankme", "last", "", "wiki_german"): "eval_wiki_german/rankme/last",
    }


@BOTH_WIDTHS
def test_whatever_a_name_is_it_is_shown_as_text_and_fits(opened: Callable[..., Any], width: int) -> None:
    names = ["<img src=x onerror=alert(1)>", "{{ 7 * 7 }}' id='a", "n" * 200, "Layer by layer"]
    values = {f"{n}/effective_rank/layer_0{i}": 2.0 + i for n in names for i in range(2)}
    tab = opened(page(Run("a", "b", [{"step": s, **values} for s in (1, 2)])), width=width, policy=False)
    headings = tab.evaluate("[...document.querySelectorAll('h2')].map(t => t.textContent)")
    assert {f"Readings named {name}" for name in names} <= set(headings)
    assert tab.locator("main img, script, iframe").count() == 0
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == 2 * len(names)
    for box in boxes:
        assert_fits(box, width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
