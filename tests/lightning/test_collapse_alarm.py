"""CollapseAlarm on real Lightning runs."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks.lightning import CollapseAlarm
from tests.lightning.test_plateau_stopping import LOADER, make_module, make_trainer
from tests.ranks import run_on_ranks
from tests.transformers.test_collapse_alarm import DIP, FALL, NEVER, alarm_step
from tests.versions import BOTH_PACKAGES
from tests.wandb_history import read_alerts

make_module = functools.partial(make_module, key="rank/last")


def alarm(**arguments: Any) -> CollapseAlarm:
    return CollapseAlarm("rank/*", **{"patience": 4, **arguments})


@BOTH_PACKAGES
@pytest.mark.parametrize(
    ("where", "steps", "arguments"), [("train", 1, {}), ("validation", 3, {"val_check_interval": 3})]
)
def test_stops_at_the_alarm_with_a_checkpoint_before(package, where, steps, arguments, tmp_path):
    told: list[Any] = []
    callbacks = [alarm(action="stop", checkpoint=True), alarm(floor=0.3, action=told.append)]
    trainer = make_trainer(tmp_path, callbacks, package, max_steps=120, max_epochs=-1, **arguments)
    stop = alarm_step(FALL) * steps
    with pytest.warns(UserWarning, match=rf"^rank/last: collapse at step {stop}, value 2: below 15 \(0.25 of 60\)"):
        trainer.fit(make_module(package, values=FALL, where=where), LOADER, LOADER)
    assert trainer.global_step == stop
    assert trainer.callback_metrics["collapse/rank/last"] == 1
    assert [(a.key, a.step, a.reference) for a in told] == [("rank/last", stop, 60.0)]
    saved = torch.load(tmp_path / f"collapse-step={stop}.ckpt", weights_only=False)
    assert saved["global_step"] == stop
    states = {key: state["raised"] for key, state in saved["callbacks"].items() if key.startswith("CollapseAlarm")}
    assert states["CollapseAlarm(rank/*)"] == ["rank/last"]
    assert sorted(states) == ["CollapseAlarm(rank/*)", "CollapseAlarm(rank/*) #2"]


@NEVER
def test_a_dip_that_recovers_is_no_alarm(tmp_path):
    trainer = make_trainer(tmp_path, [alarm(action="stop")], max_steps=40)
    trainer.fit(make_module(values=DIP), LOADER)
    assert trainer.global_step == 40
    assert "collapse/rank/last" not in trainer.callback_metrics


def test_told_once_until_it_has_recovered(tmp_path):
    told: list[Any] = []
    trainer = make_trainer(tmp_path, [alarm(action=told.append)], max_steps=40)
    with pytest.warns(UserWarning, match="collapse at step 34"):
        trainer.fit(make_module(values=[*FALL[:30], *FALL[10:20]]), LOADER)
    assert [a.step for a in told] == [alarm_step(FALL), 34]


def test_resumed_run_tells_what_the_uninterrupted_one_does(tmp_path):
    first = make_trainer(tmp_path, [alarm()], max_steps=12)
    first.fit(make_module(values=FALL), LOADER)
    first.save_checkpoint(tmp_path / "at12.ckpt")
    second = make_trainer(tmp_path, [alarm()], max_steps=40)
    with pytest.warns(UserWarning, match=f"collapse at step {alarm_step(FALL)}"):
        second.fit(make_module(values=FALL), LOADER, ckpt_path=tmp_path / "at12.ckpt")


def test_alert_reaches_wandb(own_wandb: Path):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=own_wandb, offline=True)
    trainer = make_trainer(own_wandb, [alarm()], max_steps=20, logger=logger)
    with pytest.warns(UserWarning, match="rank/last: collapse"):
        trainer.fit(make_module(values=FALL), LOADER)
    logger.experiment.finish()
    ((title, text),) = read_alerts(own_wandb / "wandb")
    assert title == "Collapse of rank/last"
    assert text.startswith(f"rank/last: collapse at step {alarm_step(FALL)}")


def collapse_on_one_rank(rank: int, world_size: int, folder: str) -> tuple[int, list[Any], list[str]]:
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from tests.distributed.reading import as_if_launched

    as_if_launched(rank, world_size)
    told: list[Any] = []
    callbacks = [alarm(action="stop"), alarm(floor=0.3, action=told.append)]
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    trainer = make_trainer(
        Path(folder), callbacks, max_steps=40, strategy=strategy, devices=world_size, use_distributed_sampler=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(values=FALL if rank else DIP), LOADER)
    lines = [str(w.message) for w in caught if "collapse at step" in str(w.message)]
    return trainer.global_step, told, lines


def test_all_ranks_go_on_alike_and_the_first_one_tells(tmp_path):
    (step, told, lines), other = run_on_ranks(collapse_on_one_rank, 2, str(tmp_path))
    assert step == alarm_step(FALL)
    assert [(a.key, a.step) for a in told] == [("rank/last", step)]
    assert len(lines) == 2
    assert other == (step, told, [])
