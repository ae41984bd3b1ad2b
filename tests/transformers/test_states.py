"""What a resumed Trainer keeps of its callbacks' states when their settings have changed, and what it is told."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks import PlateauDetector
from matent_callbacks.transformers import CollapseAlarm, MatrixEntropyCallback, PlateauStopping
from tests.conftest import collate, text_examples

PROBE, OTHER = (collate(text_examples(4, start=start)) for start in (300, 400))


def probed(every_n_steps: int = 2, layers: Any = "last", **arguments: Any) -> MatrixEntropyCallback:
    return MatrixEntropyCallback(every_n_steps, layers, **{"probe": PROBE, "reference": "start", **arguments})


@pytest.fixture
def resume(make_trainer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Train four steps with some callbacks, and from there to the sixth with others; return the second Trainer."""

    def run(
        before: list[Any], after: list[Any], *, score: Callable[[int], float] | None = None, **arguments: Any
    ) -> Any:
        folder = tmp_path / "checkpoints"
        settings = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 4, **arguments}
        for callbacks, steps in ((before, 4), (after, settings.pop("until", 6))):
            trainer = make_trainer(callbacks, **{**settings, "max_steps": steps})
            if score is not None:
                trainer.log = adding(trainer, score)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if callbacks is after else None)
        return trainer

    return run


def adding(trainer: Any, score: Callable[[int], float]) -> Callable[..., None]:
    log = trainer.log
    return lambda logs, *args: log({**logs, "score": score(trainer.state.global_step)}, *args)


def told(run: Callable[[], Any], about: str = "resumed") -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if about in str(w.message)]


def keys_at(trainer: Any, step: int) -> set[str]:
    return {key for r in trainer.state.log_history if r["step"] == step for key in r if "diff_erank" in key}


@pytest.mark.parametrize(
    ("after", "kept", "reason"),
    [
        ({"every_n_steps": 3}, {"diff_erank/last"}, None),
        ({"layers": [1, "last"]}, {"diff_erank/last"}, "diff_erank/layer_01: these layers have no reference"),
        ({"probe": OTHER}, set(), "diff_erank/last: .* are of another `probe`"),
        ({"max_tokens": 20}, set(), "are of another .*`max_tokens`"),
        ({"name": "mine"}, set(), "mine/diff_erank/last: the checkpoint has no reference values of this callback"),
        ({"probe": {"new": PROBE}}, set(), "new/diff_erank/last: .* another `probe`"),
        ({"metrics": "matrix_entropy", "prog_bar": True}, {"diff_erank/last"}, None),
    ],
)
def test_of_the_reference_of_the_start_what_still_holds_is_kept_and_no_other_is_measured(resume, after, kept, reason):
    first, second = probed(), probed(**after)
    trainer, lines = told(lambda: resume([first], [second]))
    assert keys_at(trainer, 6) == kept
    before, now = (callback.state_dict()["reference_ranks"] for callback in (first, second))
    assert now == (before if kept else {})
    assert len(lines) == (reason is not None)
    if reason is not None:
        assert re.search(reason, lines[0])


def test_a_callback_that_joins_a_run_that_is_resumed_has_no_reference_of_the_start(resume):
    late = probed()
    trainer, lines = told(lambda: resume([], [late]))
    assert keys_at(trainer, 6) == set()
    assert any("effective_rank/last" in record for record in trainer.state.log_history)
    assert len(lines) == 1
    assert late.state_dict()["reference_ranks"] == {}


def test_a_reference_model_is_measured_again_on_another_probe(resume, make_llama):
    other = make_llama(seed=5)
    second = probed(reference=other, probe=OTHER)
    trainer, lines = told(lambda: resume([probed(reference=other)], [second]))
    assert keys_at(trainer, 6) == {"diff_erank/last"}
    assert lines == []
    trainer, lines = told(lambda: resume([probed(reference=other)], [probed()]))
    assert keys_at(trainer, 6) == set()
    assert "another `reference`" in lines[0]


def test_two_of_a_kind_find_their_own_states(resume):
    def pair() -> list[Any]:
        return [probed(), probed(layers=[1]), probed(layers=[0], name="mine")]

    first, second = pair(), pair()
    trainer, lines = told(lambda: resume(first, second))
    assert lines == []
    assert [c.state_dict() for c in first] == [c.state_dict() for c in second]
    assert keys_at(trainer, 6) == {"diff_erank/last", "diff_erank/layer_01", "mine/diff_erank/layer_00"}
    kept = trainer.state.stateful_callbacks["matent_callbacks"]
    assert set(kept) == {"MatrixEntropyCallback", "MatrixEntropyCallback #2", "MatrixEntropyCallback(name=mine)"}
    # In another order none takes the other's values.
    _, lines = told(lambda: resume(pair(), pair()[1::-1]))
    assert len(lines) == 2


def test_a_state_of_an_earlier_version_is_as_good_as_none(resume, make_trainer, tmp_path):
    resume([], [])
    file = tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    old = "MatrixEntropyCallback(every_n_steps=2, layers=last)"
    state["stateful_callbacks"]["matent_callbacks"] = {old: {"reference_ranks": {"sequence_effective_rank/last": 3.0}}}
    file.write_text(json.dumps(state))
    callback = probed()

    trainer = make_trainer([callback])
    _, lines = told(lambda: trainer.train(resume_from_checkpoint=str(file.parent)))
    assert trainer.state.global_step == 6
    assert len(lines) == 1


@pytest.mark.parametrize(
    "changed", [{"patience": 2}, {"patience": 4}, {"mode": "min"}, {"min_delta": 0.5}, {"smoothing": 0.1}]
)
def test_other_settings_of_plateau_stopping_judge_the_values_of_before_too(resume, make_trainer, changed):
    given: dict[str, Any] = {"min_delta": 1.0, "patience": 3, "mode": "any", "verbose": False}
    trainer = resume(
        [PlateauStopping("score", **given)],
        [PlateauStopping("score", **given | changed)],
        score=lambda step: 5.0,
        until=30,
    )
    detector = PlateauDetector(**{k: v for k, v in (given | changed).items() if k != "verbose"})
    assert trainer.state.global_step == next(step for step in range(1, 30) if detector.update(step, 5.0))


def test_two_plateau_stoppings_on_one_name_keep_their_own_history(resume):
    def pair() -> list[Any]:
        return [PlateauStopping("score", min_delta=1.0, patience=9, mode=mode) for mode in ("max", "min")]

    after = pair()
    resume(pair(), after, score=lambda step: 3.0 * step)
    up, down = (callback.state_dict() for callback in after)
    assert [step for step, *_ in up["window"]] == [step for step, *_ in down["window"]] == [1, 2, 3, 4, 5, 6]
    assert (up["window"][-1][2], down["window"][-1][2]) == (0, 6)


@pytest.mark.parametrize("changed", [{"floor": 0.5}, {"patience": 4}, {"relative_to": "first"}, {"relative_to": 50}])
def test_other_settings_of_a_collapse_alarm_judge_the_values_of_before_too(resume, changed):
    series = [60.0, 80.0, 90.0, *[12.0] * 7]
    alarms: dict[str, list[Any]] = {"whole": [], "resumed": []}
    given: dict[str, Any] = {"floor": 0.25, "patience": 3}
    for name, before in (("whole", given | changed), ("resumed", given)):
        callbacks = [
            [CollapseAlarm("score", **settings, action=alarms[name].append)] for settings in (before, given | changed)
        ]
        resume(*callbacks, score=lambda step: series[step - 1], until=10)
    assert alarms["whole"]
    assert alarms["whole"] == alarms["resumed"]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_its_own_settings_in_its_state(resume, tmp_path, restore):
    trainer = resume(
        [probed()], [probed()], hub_token="hf_secret", restore_callback_states_from_checkpoint=restore, seed=5
    )
    assert trainer.args.hub_token == "hf_secret"
    for kept, steps in (
        (json.loads((tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text()), "4"),
        (vars(trainer.state), "6"),
    ):
        settings = kept["stateful_callbacks"]["matent_callbacks.settings"]
        assert (settings["max_steps"], settings["seed"], settings["lr_scheduler_type"]) == (steps, "5", "linear")
        assert "hf_secret" not in json.dumps(settings)
        assert len(json.dumps(settings)) < 6000
