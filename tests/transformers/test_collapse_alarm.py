"""CollapseAlarm on a real Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks import CollapseDetector
from matent_callbacks.plot._style import alarms
from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback
from tests.wandb_history import read_alerts

# A dip that recovers; and a fall to stay, that is over from step 26 on.
DIP = [60.0, *[4.0 + step for step in range(39)]]
FALL = [*[60.0 - step % 3 for step in range(10)], *[2.0] * 15, *[50.0] * 15]
NEVER = pytest.mark.filterwarnings("error:.*collapse")


def alarm_step(values: list[float]) -> int:
    detector = CollapseDetector(floor=0.25, patience=4)
    return next(step for step, value in enumerate(values, start=1) if detector.update(step, value))


def logging(trainer: Any, **series: list[float]) -> Any:
    """The Trainer logs one value of each series a step."""
    log = trainer.log
    trainer.log = lambda logs, *args: log(
        {**logs, **{f"rank/{name}": values[max(trainer.state.global_step, 1) - 1] for name, values in series.items()}},
        *args,
    )
    return trainer


def alarm(**arguments: Any) -> CollapseAlarm:
    return CollapseAlarm("rank/*", **{"patience": 4, **arguments})


def test_each_name_is_watched_told_once_and_told_again_after_a_recovery(make_trainer):
    again = [*FALL[:30], *FALL[10:20]]
    told: list[Any] = []
    trainer = logging(make_trainer([alarm(action=told.append)], max_steps=40), fall=FALL, dip=DIP, twice=again)
    with pytest.warns(UserWarning, match=r"^rank/fall: collapse at step 1\d, value 2: below 15 \(0.25 of 60\)"):
        trainer.train()
    assert trainer.state.global_step == 40
    first = alarm_step(FALL)
    assert 10 < first < 20
    assert [(a.key, a.step) for a in told] == [("rank/fall", first), ("rank/twice", first), ("rank/twice", 34)]
    assert all((a.value, a.reference) == (2.0, 60.0) for a in told)
    assert alarms(trainer.state.log_history) == {"rank/fall": [first], "rank/twice": [first, 34]}
    recoveries = [(r["step"], r["collapse/rank/fall"]) for r in trainer.state.log_history if "collapse/rank/fall" in r]
    assert recoveries == [(first, 1.0), (26, 0.0)]


def test_a_value_that_climbs_below_the_floor_has_not_recovered(make_trainer):
    climbs = [60.0] * 5 + [2.0] * 4 + [2.0 + 0.5 * step for step in range(15)] + [1.0] * 8
    told: list[Any] = []
    trainer = logging(make_trainer([alarm(action=told.append)], max_steps=32), climbs=climbs)
    detector = CollapseDetector(floor=0.25, patience=4)
    decisions = [detector.update(step, value) for step, value in enumerate(climbs, start=1)]
    first = decisions.index(True)
    assert True in decisions[first + decisions[first:].index(False) :]  # it says so, takes it back, and says so again
    with pytest.warns(UserWarning, match="rank/climbs: collapse"):
        trainer.train()
    assert [a.step for a in told] == [first + 1]


@NEVER
def test_a_dip_that_recovers_is_no_alarm(make_trainer):
    trainer = logging(make_trainer([alarm(action="stop")], max_steps=40), dip=DIP)
    trainer.train()
    assert trainer.state.global_step == 40
    assert not alarms(trainer.state.log_history)


def test_stops_with_a_checkpoint_that_knows_of_the_alarm(make_trainer, tmp_path):
    def trainer() -> Any:
        callback = alarm(action="stop", checkpoint=True)
        made = make_trainer([callback], max_steps=40, output_dir=str(tmp_path / "checkpoints"))
        return logging(made, fall=FALL)

    stopped = trainer()
    with pytest.warns(UserWarning, match="rank/fall: collapse"):
        stopped.train()
    stop = alarm_step(FALL)
    assert stopped.state.global_step == stop
    saved = tmp_path / "checkpoints" / f"checkpoint-{stop}"
    assert saved.is_dir()
    # Raised before the checkpoint, it is not raised again.
    goes_on = trainer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        goes_on.train(resume_from_checkpoint=str(saved))
    assert not [w for w in caught if "collapse at step" in str(w.message)]
    assert goes_on.state.global_step == 40


def test_resumed_run_tells_what_the_uninterrupted_one_does(make_trainer, tmp_path):
    def trainer(**arguments: Any) -> Any:
        made = make_trainer([alarm()], output_dir=str(tmp_path / "checkpoints"), save_steps=12, **arguments)
        return logging(made, fall=FALL)

    trainer(max_steps=12, save_strategy="steps").train()
    resumed = trainer(max_steps=40)
    with pytest.warns(UserWarning, match=f"rank/fall: collapse at step {alarm_step(FALL)}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-12"))


def test_alert_reaches_wandb(make_trainer, own_wandb: Path):
    import wandb

    trainer = logging(make_trainer([alarm()], max_steps=20, report_to=["wandb"]), fall=FALL)
    with pytest.warns(UserWarning, match="rank/fall: collapse"):
        trainer.train()
    wandb.finish()
    ((title, text),) = read_alerts(own_wandb / "wandb")
    assert title == "Collapse of rank/fall"
    assert text.startswith(f"rank/fall: collapse at step {alarm_step(FALL)}, value 2")


def test_an_action_that_fails_is_told_and_training_goes_on(make_trainer):
    def broken(told: Any) -> None:
        raise OSError("no mail")

    trainer = logging(make_trainer([alarm(action=broken)], max_steps=20), fall=FALL)
    with pytest.warns(UserWarning, match="no mail.*without what `action` does"):
        trainer.train()
    assert trainer.state.global_step == 20


@NEVER
def test_readings_of_a_healthy_run_are_watched(make_trainer):
    callback = CollapseAlarm(patience=2)
    make_trainer([callback, MatrixEntropyCallback(1, layers="all")], max_steps=6).train()
    assert sorted(callback.state_dict()["detectors"]) == [
        f"effective_rank/{layer}" for layer in ("last", "layer_00", "layer_01", "layer_02")
    ]


def test_what_is_never_logged_is_told(make_trainer):
    with pytest.warns(UserWarning, match=r"`monitor` 'efective_rank/\*' was never logged, so no collapse"):
        make_trainer([CollapseAlarm("efective_rank/*")], max_steps=1).train()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`action` must be 'warn', 'stop' or a function, got 'mail'"):
        CollapseAlarm(action="mail")
    with pytest.raises(ValueError, match=r"`floor` must be a number between 0 and 1, got 2"):
        CollapseAlarm(floor=2)
