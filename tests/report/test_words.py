"""The summary in words, against curves of which it is known what they do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matent_callbacks.accumulate.catalogue import measured_settings
from matent_callbacks.plot._style import evenly
from matent_callbacks.report import Run, Stop, comparison, page, read_run
from matent_callbacks.report._figures import pictures
from matent_callbacks.report._findings import _sinks, missing, moved, summary
from matent_callbacks.report._keys import Quantity
from matent_callbacks.report._picture import peaks
from matent_callbacks.report._run import Curve
from matent_callbacks.report._words import number
from tests.conftest import collate, text_examples
from tests.report.conftest import Logged


def test_sentences_say_what_the_readings_show_and_no_more() -> None:
    assert moved("training loss", Curve([1, 5, 9], [4.0, 1.5, 2.0])) == (
        "Training loss fell from 4 at step 1 to 2 at step 9, by 2; lowest 1.5 at step 5."
    )
    assert moved("RankMe", Curve([0, 2000, 3000, 4000], [1.0, 0.5, 7.0, 3.25])) == (
        "RankMe rose from 1 at step 0 to 3.25 at step 4,000, by 2.25; lowest 0.5 at step 2,000; "
        "highest 7 at step 3,000."
    )
    assert moved("loss", Curve([1, 2], [2.0, 2.0])) == "Loss is 2 at step 1 and at step 2."
    assert moved("loss", Curve([7], [2.0])) == "Loss: 2 at step 7, the only reading."
    assert moved("loss", Curve([1, 2, 3], [2.0, math.nan, 1.0])) == (
        "Loss fell from 2 at step 1 to 1 at step 3, by 1. 1 of its 3 readings is NaN or infinite."
    )
    assert moved("loss", Curve([1, 2], [math.nan, math.inf])) == "Loss: no reading is a finite number (2 are not)."
    assert moved("loss", Curve([], [])) == ""


def test_layers_that_went_different_ways() -> None:
    records = [
        {"step": 1, "effective_rank/layer_00": 5.0, "effective_rank/layer_01": 8.0, "effective_rank/last": 2.0},
        {"step": 2, "effective_rank/layer_00": 6.0, "effective_rank/layer_01": 4.0, "effective_rank/last": 2.0},
    ]
    assert summary(Run("a", "b", records)) == {
        "Effective rank": [
            "Effective rank of the last layer is 2 at step 1 and at step 2.",
            "From first to last reading it rose in 1 and fell in 1 of 3 layers, most in layer_01: from 8 to 4.",
        ]
    }
    for record in records:
        record.pop("effective_rank/layer_00")
        record.pop("effective_rank/last")
        record["effective_rank/layer_10"] = record["effective_rank/layer_2"] = 9.0 - record["step"]
    # 10 comes after 2.
    assert summary(Run("a", "b", records))["Effective rank"] == [
        "Effective rank of layer_10 fell from 8 at step 1 to 7 at step 2, by 1.",
        "From first to last reading it fell in all 3 layers, most in layer_01: from 8 to 4.",
    ]


def test_changes_that_the_digits_do_not_show_are_none() -> None:
    records = [
        {"step": s, "drift/layer_00": 0.0, "drift/layer_01": 2.7370 + 1e-5 * s, "drift/last": 2.7371 - 1e-5 * s}
        for s in (1, 7)
    ]
    assert summary(Run("a", "b", records))["Drift from the reference"] == [
        "Drift from the reference of the last layer is 2.737 at step 1 and at step 7.",
        "From first to last reading it is the same in all 3 layers.",
    ]
    records[1]["drift/layer_01"] = 3.0
    assert summary(Run("a", "b", records))["Drift from the reference"][1] == (
        "From first to last reading it rose in 1 and fell in 0 of 3 layers, most in layer_01: from 2.737 to 3."
    )


def test_a_loss_that_is_nan_is_not_praised_as_the_lowest(make_trainer: Any) -> None:
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(math.nan)

    whole = make_trainer()
    broken = make_trainer([Break()])
    runs = []
    for trainer in (whole, broken):
        trainer.train()
        trainer.save_state()
        runs.append(read_run(trainer.args.output_dir))
    assert runs[1].curve(Quantity("loss")).values[3:] == [0, 0, 0]
    first, *_, last = runs[1].curve(Quantity("loss")).values[:3]
    (said,) = summary(runs[1])["Loss"]
    assert said.startswith(f"Training loss fell from {number(first)} at step 1 to {number(last)} at step 3, by ")
    assert said.endswith(
        " 3 of its 6 readings are exactly 0, the first at step 4, and left out here: Hugging Face's Trainer logs 0 "
        "where the loss is NaN."
    )
    (picture, *_) = pictures(runs[1])["Loss beside entropy and effective rank"]
    assert "Where it is exactly 0, it may be none" in picture.caption
    assert "exactly 0" not in page(runs[0])
    html = comparison(runs)
    assert "Readings of exactly 0 are left out" in html
    assert "<td>never</td>" in html or ">never<" in html
    nothing = [{"step": s, "loss": 0.0} for s in (1, 2)]
    assert summary(Run("a", "b", nothing))["Loss"][0].startswith(
        "Training loss: no reading is another number. 2 of its 2 readings are exactly 0, the first at step 1"
    )


def test_a_picture_of_a_probe_says_that_evaluations_read_their_own_batches() -> None:
    records = [
        {"step": s, "p/effective_rank/last": 2.0 + s, "eval_p/effective_rank/last": 3.0, "p/rankme/last": 1.0 + s}
        for s in (1, 2)
    ]
    sections = pictures(Run("a", "b", records, settings=measured_settings({"p": "a probe"})))
    found = {picture.name.removeprefix("named-0-"): picture for group in sections.values() for picture in group}
    assert found["effective_rank"].caption == ("Measured on a probe; what is held out, on the batches of evaluations.")
    assert found["rankme"].caption == "Measured on a probe."


def test_the_record_of_a_reference_tells_whether_sinks_are_left_out(make_trainer: Any) -> None:
    from matent_callbacks.transformers import MatrixEntropyCallback

    probe = collate(text_examples(4))
    options: Any = {"probe": probe, "reference": "start"}
    trainer = make_trainer(
        [
            MatrixEntropyCallback(2, exclude_sinks=False, **options),
            MatrixEntropyCallback(2, name="wide", **options),
            MatrixEntropyCallback(2, name="two", probe={"x": probe}, reference="start"),
            MatrixEntropyCallback(2, name="none"),
        ]
    )
    trainer.train()
    trainer.save_state()
    run = read_run(trainer.args.output_dir)
    told = {}
    for name in ("", "wide", "two/x", "none"):
        key = f"{name and f'{name}/'}sink_tokens/layer_00"
        with_sinks = Run("a", "b", [{"step": 1, key: 1.0}], settings=run.settings, part=name)
        told[name] = next(iter(_sinks(with_sinks).rpartition("entropies and ranks ")[2:]))
    unknown = "leave them out, unless `exclude_sinks=False` was given, which the log does not say."
    assert told == {"": "include them.", "wide": "leave them out.", "two/x": "leave them out.", "none": unknown}


def test_summary_of_the_real_run(stopped: Logged) -> None:
    run = read_run(stopped.folder)
    said = summary(run)
    assert list(said) == ["Stop", "Loss", "Matrix entropy", "Effective rank", "Spectrum", "Image and text", "Stages"]
    (stop,) = said["Stop"]
    assert stop.startswith(f"PlateauStopping ended the run on loss: plateau at step {run.steps[-1]}, value ")
    losses = [record["loss"] for record in stopped.history if "loss" in record]
    assert f"from {losses[0]:.4g} at step 1 to {losses[-1]:.4g} at step {run.steps[-1]}" in said["Loss"][0]
    assert said["Loss"][1].startswith("Held-out loss ")
    assert len(said["Stages"]) == 5
    # In a log without the stop, only what was observed is told.
    observed = summary(read_run(stopped.wandb))["Stop"]
    assert observed == [
        f"PlateauStopping watched loss: at its last observation, at step {run.steps[-1]}, {run.steps[-1]} observations "
        "had passed since progress."
    ]


def test_what_is_missing_is_told() -> None:
    every = [{"step": s, "loss": 1.0 / s} for s in range(1, 21)]
    assert missing(Run("a", "b", every)) == [
        "Not in the log of this run: held-out loss, matrix entropy of layers, effective rank of layers, Diff-eRank, "
        "spectrum, image-text alignment."
    ]
    for record in every:
        record.update(eval_loss=1.0)
        if record["step"] <= 12:
            record.update({"effective_rank/last": 2.0, "matrix_entropy/last": 2.0, "matrix_entropy/layer_00": 2.0})
    assert missing(Run("a", "b", every))[1:] == [
        "effective_rank/last was logged from step 1 to step 12 only; the log as a whole goes from step 1 to step 20.",
        "matrix entropy (2 names, such as matrix_entropy/last) was logged from step 1 to step 12 only; the log as a "
        "whole goes from step 1 to step 20.",
    ]
    # Readings that are merely rarer than the losses miss nothing.
    rare = [{"step": s, "loss": 1.0, **({"diff_erank/last": 1.0} if s % 10 == 0 else {})} for s in range(1, 50)]
    assert len(missing(Run("a", "b", rare))) == 1


def test_nonfinite_tokens_are_counted() -> None:
    records = [{"step": s, "nonfinite_tokens/last": float(s > 1) * 4} for s in (1, 2, 3)]
    assert summary(Run("a", "b", records)) == {
        "Left out": ["In the last layer 8 tokens that held NaN or Inf were left out, from step 2 on."]
    }


def test_attention_sinks_are_told_with_whether_they_are_left_out() -> None:
    values = {"layer_00": 0.0, "layer_03": 2.5, "layer_12": 1.0, "last": 0.0}
    born = {"step": 1, **{f"eval_sink_tokens/{layer}": 0.0 for layer in values}}
    grown = {"step": 2, **{f"eval_sink_tokens/{layer}": value for layer, value in values.items()}}

    def told(settings: dict[str, str]) -> list[str]:
        return summary(Run("a", "b", [born, grown], settings=settings))["Left out"]

    where = (
        "At the last reading (held out) there are attention sinks in 2 of 4 layers: layer_03 (2.5 a sequence), "
        "layer_12 (1 a sequence); entropies and ranks "
    )
    assert told({"exclude_sinks": "True"}) == [f"{where}leave them out."]
    assert told({"exclude_sinks": "False"}) == [f"{where}include them."]
    unknown = "leave them out, unless `exclude_sinks=False` was given, which the log does not say."
    assert told({}) == [where + unknown]
    assert "Left out" not in summary(Run("a", "b", [born]))
    probe = {key.replace("eval_", "code/"): value for key, value in grown.items()}
    (*_, sentence) = summary(Run("a", "b", [probe]))["Readings named code"]
    assert sentence == where.replace(" (held out)", "") + unknown


def test_thinning_keeps_peaks_and_ends() -> None:
    values = [math.sin(i / 1e4) for i in range(100_000)]
    values[31_415], values[92_653] = 50.0, -50.0
    thin = peaks(Curve(list(range(100_000)), values))
    assert len(thin.steps) <= 804
    assert (max(thin.values), min(thin.values)) == (50.0, -50.0)
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    assert all(values[int(s)] == v for s, v in zip(*thin, strict=True))
    assert peaks(Curve([1, 2], [3.0, 4.0])) == Curve([1, 2], [3.0, 4.0])
    assert evenly(range(100), 4) == [0, 33, 66, 99]


def test_a_long_run_says_how_much_of_it_is_drawn() -> None:
    records = [{"step": s, "loss": 1.0 + (s == 77_777)} for s in range(100_000)]
    for record in records[::100]:
        record.update({f"effective_rank/layer_{i:02d}": 2.0 + i for i in range(3)})
    sections = pictures(Run("a", "b", records, stop=Stop(500, "loss", "why")))
    loss, rank = sections["Loss beside entropy and effective rank"]
    assert "of 100,000 readings: of each stretch the first, the lowest, the highest and the last." in loss.caption
    assert len(loss.rows) == 60
    assert loss.table_caption == "60 of 100,000 steps, evenly spaced."
    assert ">plateau, step 500<" in loss.svg
    assert len(loss.svg) < 60_000
    (heatmap,) = sections["Layer by layer"]
    assert "Drawn are 240 of 1,000 readings, evenly spaced." in heatmap.caption
    assert rank.columns == ["step", "layer_00", "layer_01", "layer_02"]


def test_tables_hold_the_numbers_of_the_run(stopped: Logged, tmp_path: Path) -> None:
    run = read_run(stopped.folder)
    found = {picture.name: picture for group in pictures(run).values() for picture in group}
    assert list(found) == [
        "loss",
        "matrix_entropy",
        "effective_rank",
        "heatmap",
        "change",
        "spectrum",
        "alignment-image_text",
        "alignment-image_reduction_ratio",
        "alignment-grounding",
        "alignment-image_text_shift",
        "alignment-cka_debiased",
        "alignment-cka_z",
        "stages-effective_rank",
    ]
    by_step = {record["step"]: record for record in run.records}
    picture = found["stages-effective_rank"]
    assert picture.columns == [
        "step",
        "vision encoder",
        "connector",
        "image alone",
        "text alone",
        "image and text together",
    ]
    for row in picture.rows:
        assert float(row[5]) == float(f"{by_step[int(row[0])]['effective_rank/image_text']:.4g}")
    last = run.steps[-1]
    layer, at, *shares = found["spectrum"].rows[-1]
    assert (layer, at) == ("last layer", f"{last:g}")
    assert shares == [f"{by_step[last][f'spectrum_top_{k}/last']:.1%}" for k in (1, 2, 4, 8, 16)]
    assert ">step 1<" in found["spectrum"].svg
    top, *_, bottom = found["heatmap"].rows
    assert (top[0], bottom[0]) == ("last layer", "layer_00")
    assert float(bottom[1]) == float(f"{by_step[1]['effective_rank/layer_00']:.4g}")


def test_a_picture_without_a_finite_value_is_left_out() -> None:
    records = [{"step": s, "loss": math.nan, "matrix_entropy/last": 1.0, "matrix_entropy/a": 0.0} for s in (1, 2)]
    sections = pictures(Run("a", "b", records))
    assert [p.name for group in sections.values() for p in group] == ["matrix_entropy", "heatmap"]
    records = [{"step": s, "effective_rank/last": -math.inf, "effective_rank/a": math.nan} for s in (1, 2)]
    assert [p for group in pictures(Run("a", "b", records)).values() for p in group] == []


def test_of_many_layers_those_that_moved_most_are_drawn_and_it_is_said() -> None:
    names = [*(f"layer_{i:02d}" for i in range(30)), "last"]
    moving = {"layer_07": 40.0, "layer_21": -60.0}
    records = [
        {"step": s, **{f"effective_rank/{n}": 70.0 + i + s * moving.get(n, 1.0) for i, n in enumerate(names)}}
        for s in (0, 1)
    ]
    found = pictures(Run("r", "by hand", records))["Loss beside entropy and effective rank"]
    (picture,) = (p for p in found if p.name == "effective_rank")
    assert picture.columns == ["step", "layer_00", "layer_07", "layer_21", "last layer"]
    assert picture.caption == (
        "Of 31 layers the first, the last, and the two that moved most from first to last reading."
    )
