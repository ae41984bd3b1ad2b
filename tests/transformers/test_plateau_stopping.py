"""PlateauStopping on a real Trainer."""

from __future__ import annotations

from typing import Any

import pytest

from matent_callbacks import PlateauDetector
from matent_callbacks.transformers import MatrixEntropyCallback, PlateauStopping
from tests.conftest import collate, text_examples

SCORES = [min(step, 12) / 2 for step in range(1, 60)]


def stopped_at(values: list[float]) -> int:
    detector = PlateauDetector(min_delta=1.0, patience=4)
    return next(step for step, value in enumerate(values, start=1) if detector.update(step, value))


def test_stops_at_the_plateau_and_says_why_once(make_trainer, capsys):
    trainer = make_trainer([PlateauStopping("score", min_delta=1.0, patience=4)], max_steps=50)
    log = trainer.log
    trainer.log = lambda logs, *args: log({**logs, "score": SCORES[trainer.state.global_step - 1]}, *args)
    trainer.train()
    expected = stopped_at(SCORES)
    assert 12 < expected < 25
    assert trainer.state.global_step == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopping")]
    assert len(lines) == 1
    assert f"score: plateau at step {expected}, value 6" in lines[0]


def test_any_logged_key_and_the_trend_reach_the_records(make_trainer):
    probe = collate(text_examples(4, start=300))
    for monitor in ("loss", "effective_rank/last", "eval_effective_rank/last"):
        trainer = make_trainer(
            [
                # Listed before what it reads: it is put behind it.
                PlateauStopping(monitor, min_delta=1e9, patience=2, mode="any", verbose=False),
                MatrixEntropyCallback(1, probe=probe),
            ],
            max_steps=40,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        assert trainer.state.global_step == 6  # nothing moves by 1e9, and the window is 6 observations
        with_trend = [r for r in trainer.state.log_history if f"plateau/{monitor}" in r]
        assert [r["step"] for r in with_trend] == [2, 3, 4, 5, 6]
        assert all(monitor in r for r in with_trend)
        assert [r[f"plateau/{monitor}/since_progress"] for r in with_trend] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("restore_flag", [False, True])
def test_resumed_run_stops_where_the_uninterrupted_one_does(make_trainer, make_llama, tmp_path, restore_flag):
    def trainer(**arguments: Any) -> Any:
        stopping = PlateauStopping("effective_rank/last", min_delta=0.5, patience=4, mode="any", verbose=False)
        return make_trainer(
            [MatrixEntropyCallback(1, probe=collate(text_examples(4, start=300))), stopping],
            max_steps=60,
            learning_rate=3e-4,
            save_strategy="steps",
            save_steps=4,
            output_dir=str(tmp_path / "checkpoints"),
            restore_callback_states_from_checkpoint=restore_flag,
            **arguments,
        )

    whole = trainer()
    whole.train()
    stop = whole.state.global_step
    assert 6 < stop < 60
    resumed = trainer(model=make_llama(seed=9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    assert resumed.state.global_step == stop


def test_a_name_that_is_never_logged_is_told_with_near_matches(make_trainer):
    trainer = make_trainer([PlateauStopping("eval_los", min_delta=1.0, patience=2)], max_steps=1)
    with pytest.warns(UserWarning, match=r"`monitor` 'eval_los' was never logged.*Near: .*loss"):
        trainer.train()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`min_delta` must be a finite number above 0, got 0"):
        PlateauStopping("loss", min_delta=0, patience=3)
    with pytest.raises(ValueError, match=r"`mode` must be one of max, min, any, got 'up'"):
        PlateauStopping("loss", min_delta=1, patience=3, mode="up")
