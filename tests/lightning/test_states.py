"""What a resumed Lightning run keeps of its callbacks' states when their settings have changed, and what it is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import PlateauDetector
from matent_callbacks.lightning import CollapseAlarm, MatrixEntropyCallback, PlateauStopping
from tests.conftest import collate, text_examples
from tests.lightning import test_plateau_stopping as simple
from tests.lightning.test_matrix_entropy_callback import loader, make_module, make_trainer
from tests.transformers.test_states import told
from tests.versions import BOTH_PACKAGES

__all__ = ["make_module", "make_trainer"]

PROBE, OTHER = (collate(text_examples(4, start=start)) for start in (300, 400))


def probed(every_n_steps: int = 2, layers: Any = "last", **arguments: Any) -> MatrixEntropyCallback:
    return MatrixEntropyCallback(every_n_steps, layers, **{"probe": PROBE, "reference": "start", **arguments})


@pytest.fixture
def resume(make_module: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Train four steps with some callbacks, and from there to the sixth with others; return the second Trainer."""

    def run(before: list[Any], after: list[Any], package: str = "lightning.pytorch") -> Any:
        path = None
        for callbacks, steps in ((before, 4), (after, 6)):
            trainer = make_trainer(package, callbacks=callbacks, max_steps=steps)
            trainer.fit(make_module(package), loader(24), ckpt_path=path)
            path = tmp_path / "at.ckpt"
            trainer.save_checkpoint(path)
        return trainer

    return run


@BOTH_PACKAGES
@pytest.mark.parametrize(
    ("after", "kept", "reason"),
    [
        ({"every_n_steps": 3}, {"diff_erank/last"}, None),
        (
            {"layers": [1, "last"], "metrics": "rankme"},
            {"diff_erank/last"},
            "layer_01: these layers have no",
        ),
        ({"probe": OTHER}, set(), "diff_erank/last: .* are of another `probe`"),
        ({"name": "mine"}, set(), "mine/diff_erank/last: the checkpoint has no reference values of this callback"),
    ],
)
def test_of_the_reference_of_the_start_what_still_holds_is_kept_and_no_other_is_measured(
    resume, package, after, kept, reason
):
    first, second = probed(), probed(**after)
    trainer, lines = told(lambda: resume([first], [second], package))
    assert {key for key in trainer.callback_metrics if "diff_erank" in key} == kept
    before, now = (callback.state_dict()["reference_ranks"] for callback in (first, second))
    assert now == (before if kept else {})
    assert len(lines) == (reason is not None)
    if reason is not None:
        assert re.search(reason, lines[0])


def test_a_callback_that_joins_a_run_that_is_resumed_has_no_reference_of_the_start(resume):
    trainer, lines = told(lambda: resume([], [probed()]))
    assert "effective_rank/last" in trainer.callback_metrics
    assert "diff_erank/last" not in trainer.callback_metrics
    assert len(lines) == 1


def test_a_callback_that_was_in_a_run_before_measures_the_start_of_the_next(make_module, make_trainer):
    callback = probed()
    values = []
    for scale in (1.0, 3.0):
        module = make_module(dropout=0.0)
        with torch.no_grad():
            for weights in module.parameters():
                weights[::2] *= scale
        make_trainer(max_steps=2, callbacks=[callback]).fit(module, loader(8))
        values.append(callback.state_dict()["reference_ranks"])
    assert values[0] != values[1]


def test_two_of_a_kind_find_their_own_states(resume, tmp_path):
    def some() -> list[Any]:
        plateaus = [PlateauStopping("a/last", min_delta=1.0, patience=9, mode=mode) for mode in ("max", "min")]
        return [
            probed(),
            probed(layers=[1]),
            probed(layers=[0], name="mine"),
            *plateaus,
            CollapseAlarm("a"),
            CollapseAlarm("b"),
        ]

    first, second = some(), some()
    _, lines = told(lambda: resume(first, second))
    assert lines == []
    assert [c.state_dict()["reference_ranks"] for c in first[:3]] == [
        c.state_dict()["reference_ranks"] for c in second[:3]
    ]
    keys = set(torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"])
    assert keys >= {
        *("MatrixEntropyCallback", "MatrixEntropyCallback #2", "MatrixEntropyCallback(name=mine)"),
        *("PlateauStopping(a/last)", "PlateauStopping(a/last) #2", "CollapseAlarm(a)", "CollapseAlarm(b)"),
    }


@pytest.mark.parametrize("changed", [{"patience": 2}, {"patience": 6}, {"mode": "min"}, {"min_delta": 0.5}])
def test_other_settings_of_plateau_stopping_judge_the_values_of_before_too(changed, tmp_path):
    given: dict[str, Any] = {"min_delta": 1.0, "patience": 4}
    first = simple.make_trainer(tmp_path, [PlateauStopping("score", **given)], max_steps=9)
    first.fit(simple.make_module(), simple.LOADER)
    first.save_checkpoint(tmp_path / "at.ckpt")
    second = simple.make_trainer(tmp_path, [PlateauStopping("score", **given | changed)], max_steps=60)
    second.fit(simple.make_module(), simple.LOADER, ckpt_path=tmp_path / "at.ckpt")
    detector = PlateauDetector(**given | changed)
    stops = [step for step, value in enumerate(simple.SCORES, start=1) if detector.update(step, value)]
    assert second.global_step == next(step for step in stops if step > 9)
