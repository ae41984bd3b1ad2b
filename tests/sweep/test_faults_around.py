"""Failures in all that callbacks do around a reading: events, logging, pictures, state, checkpoints, stopping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import transformers
from lightning.pytorch.strategies import SingleDeviceStrategy

import matent_callbacks.lightning as of_lightning
import matent_callbacks.transformers as of_transformers
from matent_callbacks import CollapseDetector, EntropyMonitor, PlateauDetector
from matent_callbacks.accumulate.probe_tokens import ProbeTokens, TokenPairs
from matent_callbacks.alignment.measurement import AlignmentMeasurement
from matent_callbacks.callbacks import drift, run_monitor
from matent_callbacks.callbacks.drift import Drift
from matent_callbacks.callbacks.guard import guarded
from matent_callbacks.callbacks.layer_pictures import LayerPictures
from matent_callbacks.callbacks.measurement import Measurement
from matent_callbacks.callbacks.observers import CollapseObserver, PlateauObserver
from matent_callbacks.callbacks.run_monitor import RunMonitor
from matent_callbacks.callbacks.unlogged import Unlogged
from matent_callbacks.functional.alignment import STAGES
from matent_callbacks.lightning import _alignment as lightning_alignment
from matent_callbacks.lightning import _matrix_entropy as lightning_entropy
from matent_callbacks.lightning import _measuring
from matent_callbacks.monitor.comparison import Comparison
from matent_callbacks.transformers import _alignment as trainer_alignment
from matent_callbacks.transformers import _matrix_entropy as trainer_entropy
from tests.conftest import collate, text_examples
from tests.sweep.runs import EVERY, FRAMEWORKS, STEPS, Record, Way, assert_same, make_callback, train

PACKAGES: dict[str, ModuleType] = {"Trainer": of_transformers, "Lightning": of_lightning}
BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)
TOLD = pytest.mark.filterwarnings("default:Monitoring failed", "default:Reading layer")


class BoomError(Exception):
    pass


def fails(*args: Any, **kwargs: Any) -> Any:
    raise BoomError("boom")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Callable[[str, Way], Record]:
    """The run without the callback, made once for all faults."""

    @functools.cache
    def run(framework: str, way: Way) -> Record:
        return train(framework, way, tmp_path_factory.mktemp("alone"), [])

    return run


def probe() -> Any:
    return collate(text_examples(4, start=300))


def entropy(framework: str, **arguments: Any) -> list[Any]:
    return [make_callback(framework, **arguments)]


def on_probe(framework: str, **arguments: Any) -> list[Any]:
    return entropy(framework, probe=probe(), reference="start", **arguments)


def drifting(framework: str, **arguments: Any) -> list[Any]:
    metrics = ("drift", "token_cosine")
    return [FRAMEWORKS[framework][1](EVERY, "last", metrics=metrics, probe=probe(), reference="start", **arguments)]


def in_background(framework: str, **arguments: Any) -> list[Any]:
    return entropy(framework, background=True, **arguments)


def embedded(model: Any, batch: Any) -> Any:
    return model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]


def alignment(framework: str, **arguments: Any) -> list[Any]:
    callback = PACKAGES[framework].AlignmentCallback
    return [callback(EVERY, stages=dict.fromkeys(STAGES, embedded), pair_measures=[], **arguments)]


def stopping(framework: str, **arguments: Any) -> list[Any]:
    """Observes a reading, and has no reason to stop."""
    observed = PACKAGES[framework].PlateauStopping(
        "matrix_entropy/last", min_delta=1e-9, patience=99, mode="any", **arguments
    )
    return [make_callback(framework, **arguments), observed]


def alarmed(framework: str, **arguments: Any) -> list[Any]:
    """An alarm at the fourth reading."""
    alarm = PACKAGES[framework].CollapseAlarm("matrix_entropy/last", relative_to=1e9, patience=2, **arguments)
    return [FRAMEWORKS[framework][1](1, **arguments), alarm]


def alarmed_by_nothing(framework: str, **arguments: Any) -> list[Any]:
    return [PACKAGES[framework].CollapseAlarm("nothing", **arguments)]


def stopping_on_nothing(framework: str, **arguments: Any) -> list[Any]:
    return [PACKAGES[framework].PlateauStopping("nothing", min_delta=1.0, patience=2, **arguments)]


@dataclass
class Place:
    """Where a failure is injected, and into which run."""

    owner: Any
    name: str
    callbacks: Callable[..., list[Any]] = entropy
    way: Way = field(default_factory=lambda: Way(evaluate=True))
    takes_pictures: bool = False
    during_run_only: bool = False
    """The place is passed by when training begins as well, where an error is raised."""
    once_done: bool = False
    """It fails when all that it does is done."""

    def __str__(self) -> str:
        owner = getattr(self.owner, "__name__", str(self.owner)).removeprefix("matent_callbacks.")
        return f"{owner}.{self.name}, {self.callbacks.__name__}{', resumed' * self.way.resume}"


RESUMED = Way(resume=True)
OF_BOTH = [
    Place(EntropyMonitor, "start"),
    Place(EntropyMonitor, "stop", once_done=True),
    Place(EntropyMonitor, "compute"),
    Place(EntropyMonitor, "compute_later", in_background),
    Place(EntropyMonitor, "read", on_probe),
    Place(EntropyMonitor, "compute", on_probe),
    Place(Measurement, "begin", on_probe),
    Place(Measurement, "reset"),
    Place(Measurement, "from_forwards"),
    Place(Measurement, "begin_evaluation"),
    Place(Measurement, "evaluation_values"),
    Place(RunMonitor, "batch_begins"),
    Place(RunMonitor, "step_ends"),
    Place(RunMonitor, "late_values", in_background),
    Place(Measurement, "from_probe", on_probe),
    Place(LayerPictures, "draw", takes_pictures=True),
    Place(Measurement, "state_dict", on_probe, RESUMED),
    Place(Measurement, "load_state_dict", on_probe, RESUMED),
    Place(ProbeTokens, "of_all_ranks", drifting),
    Place(Comparison, "choose", drifting),
    Place(Comparison, "keep", drifting),
    Place(Comparison, "pairs", drifting),
    Place(TokenPairs, "compare", drifting),
    Place(drift, "fingerprint", drifting),
    Place(drift, "_write", drifting, RESUMED),
    Place(Drift, "_read", drifting, RESUMED),
    Place(AlignmentMeasurement, "measure", alignment, during_run_only=True),
    Place(PlateauDetector, "update", stopping),
    Place(PlateauDetector, "state_dict", stopping, RESUMED),
    Place(PlateauDetector, "load_state_dict", stopping, RESUMED),
    Place(PlateauObserver, "logged_values", stopping),
    Place(Unlogged, "at_end", stopping_on_nothing),
    Place(CollapseDetector, "update", alarmed),
    Place(CollapseDetector, "state_dict", alarmed, RESUMED),
    Place(CollapseDetector, "load_state_dict", alarmed, RESUMED),
    Place(CollapseObserver, "logged_values", alarmed),
    Place(CollapseObserver, "report", alarmed),
    Place(Unlogged, "at_end", alarmed_by_nothing),
]
OF_TRAINER = [
    Place(trainer_entropy, "counted_samples"),
    Place(trainer_entropy, "log_settings"),
    Place(trainer_entropy, "takes_pictures"),
    Place(trainer_entropy, "show", takes_pictures=True),
    Place(trainer_entropy, "log_record", in_background),
    Place(trainer_entropy, "log_record", in_background, RESUMED),
    Place(trainer_alignment, "summarize_by_maximum", alignment),
    Place(of_transformers._observers, "alert", alarmed),
]
OF_LIGHTNING = [
    Place(lightning_entropy, "counted_samples"),
    Place(lightning_entropy, "log_settings"),
    Place(lightning_entropy, "takes_pictures"),
    Place(lightning_entropy, "show", takes_pictures=True),
    Place(run_monitor, "thinned", takes_pictures=True),
    Place(lightning_entropy, "publish", in_background),
    Place(lightning_entropy, "publish", in_background, RESUMED),
    Place(lightning_entropy, "logging_step", in_background),
    Place(lightning_entropy, "draws_its_batches"),
    Place(_measuring, "logging_step"),
    Place(pl.LightningModule, "log_dict"),
    Place(pl.LightningModule, "log_dict", alignment),
    Place(lightning_alignment, "summarize_by_maximum", alignment),
    Place(of_lightning._observers, "publish", stopping),
    Place(of_lightning._observers, "publish", alarmed),
    Place(of_lightning._observers, "alert", alarmed),
    Place(SingleDeviceStrategy, "reduce_boolean_decision", stopping),
    Place(SingleDeviceStrategy, "reduce_boolean_decision", alarmed),
]
CASES = [
    *[(framework, place) for framework in FRAMEWORKS for place in OF_BOTH],
    *[("Trainer", place) for place in OF_TRAINER],
    *[("Lightning", place) for place in OF_LIGHTNING],
]


def break_place(place: Place, framework: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Injects the failure; what it was called with is in the list."""
    calls: list[Any] = []
    original = getattr(place.owner, place.name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if place.during_run_only and len(calls) == 1:
            return original(*args, **kwargs)
        if place.once_done:
            original(*args, **kwargs)
        raise BoomError("boom")

    monkeypatch.setattr(place.owner, place.name, broken)
    if place.takes_pictures:
        adapter = trainer_entropy if framework == "Trainer" else lightning_entropy
        monkeypatch.setattr(adapter, "takes_pictures", lambda trainer: True)
    return calls


@TOLD
@pytest.mark.parametrize(("framework", "place"), CASES, ids=str)
def test_a_failure_is_told_once_by_name_and_training_goes_on(framework, place, tmp_path, alone, monkeypatch, recwarn):
    given = place.callbacks(framework)
    calls = break_place(place, framework, monkeypatch)
    watched = train(framework, place.way, tmp_path, given)
    assert len(calls) > place.during_run_only
    assert_same(watched, alone(framework, place.way))
    told = [str(w.message) for w in recwarn if "boom" in str(w.message)]
    assert told
    assert len(set(told)) == len(told) <= 3
    assert all("Training goes on" in text or "training goes on" in text for text in told)


@pytest.mark.parametrize(("framework", "place"), CASES, ids=str)
def test_on_error_raise_raises_it(framework, place, tmp_path, monkeypatch):
    given = place.callbacks(framework, on_error="raise")
    break_place(place, framework, monkeypatch)
    with pytest.raises(BoomError, match="boom"):
        train(framework, place.way, tmp_path, given)


def hooks_of(framework: str, cls: type) -> list[str]:
    """What a callback's classes override of the framework's own."""
    base = {"Trainer": transformers.TrainerCallback, "Lightning": pl.Callback}[framework]
    ours = [c for c in cls.__mro__ if c.__module__.startswith("matent_callbacks.")]
    # Training is told of a wrong configuration in the first ones.
    told = {"on_init_end", "on_train_begin", "on_prediction_step", "setup", "on_train_start"}
    told |= {"on_sanity_check_start", "on_validation_start", "on_test_start"}
    names = {name for c in ours for name, value in vars(c).items() if callable(value) and hasattr(base, name)}
    return sorted(name for name in names - told if not name.startswith("_"))


@TOLD
@BOTH
@pytest.mark.parametrize("make", [entropy, alignment, stopping, alarmed])
def test_every_hook_is_guarded(framework, make, tmp_path, alone, recwarn):
    way = Way(evaluate=True, resume=True)
    given = make(framework)
    for callback in given:
        cls = type(callback)
        names = hooks_of(framework, cls)
        assert len(names) >= {"Trainer": 2, "Lightning": 4}[framework]

        def failing(name: str) -> Any:
            def hook(*args: Any, **kwargs: Any) -> None:
                raise BoomError(f"boom in {name}")

            hook.__name__ = name
            return hook

        # With the hooks of its class, each of which is guarded.
        assert all(getattr(cls, name).is_guarded for name in names)
        body = {name: guarded(failing(name)) for name in names}
        callback.__class__ = type(cls.__name__, (cls,), {**body, "__module__": cls.__module__})
    watched = train(framework, way, tmp_path, given)
    assert_same(watched, alone(framework, way))
    told = {str(w.message) for w in recwarn if "boom" in str(w.message)}
    # Some hooks are called in tests only, or by predictions.
    assert len(told) >= len(given) * 2
    for text in told:
        name = text.split("boom in ")[1].split()[0]
        assert f"Training goes on without what `{name}` does" in text


@TOLD
@BOTH
@pytest.mark.parametrize(
    ("owner", "make", "state"),
    [
        (Measurement, on_probe, {"of": "somebody else"}),
        (Measurement, on_probe, {"reference_ranks": 3}),
        (Measurement, on_probe, {"reference_ranks": {"sequence_effective_rank/last": "broken"}}),
        (PlateauDetector, stopping, {"of": "somebody else"}),
        (PlateauDetector, stopping, {"window": [["a", "b", "c"]]}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_foreign_or_broken_state_in_the_checkpoint(
    framework, owner, make, state, tmp_path, alone, monkeypatch, recwarn
):
    monkeypatch.setattr(owner, "state_dict", lambda self: state)
    watched = train(framework, RESUMED, tmp_path, make(framework))
    assert_same(watched, alone(framework, RESUMED))
    assert len([w for w in recwarn if "Monitoring failed" in str(w.message)]) == 1
    assert {2, 4, 6} <= set(watched.readings)


@TOLD
def test_a_trainer_state_that_holds_something_else_under_our_name(make_trainer):
    class Squatter(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.stateful_callbacks["matent_callbacks"] = "mine"

    trainer = make_trainer(on_probe("Trainer"), save_strategy="steps", save_steps=2)
    trainer.callback_handler.callbacks.insert(0, Squatter())
    with pytest.warns(UserWarning, match="Training goes on without its state in the checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert [r["step"] for r in trainer.state.log_history if "diff_erank/last" in r] == [2, 4, 6]


class Fussy(transformers.TrainerCallback):
    """A reporter that takes no record without a loss; without our callback there is none."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not {"loss", "train_loss", "eval_loss"} & set(logs):
            raise BoomError("boom")


class StopsAt5(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 5


@TOLD
@pytest.mark.parametrize("make", [in_background, on_probe])
def test_a_reporter_that_does_not_take_a_record_of_its_own(make, make_trainer):
    callbacks = make("Trainer")
    trainer = make_trainer([*callbacks, Fussy(), StopsAt5()])
    with pytest.warns(UserWarning, match="boom Training goes on without the record of"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.evaluate()["eval_matrix_entropy/last"] > 0


@TOLD
def test_a_log_history_that_somebody_keeps_empty(make_trainer):
    class Forgets(list):
        def append(self, record: Any) -> None:
            pass

    class Empties(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history = Forgets()

    trainer = make_trainer([*stopping("Trainer"), Empties()])
    with pytest.warns(UserWarning, match="IndexError: list index out of range Training goes on"):
        trainer.train()
    assert trainer.state.global_step == 6


@TOLD
@BOTH
@pytest.mark.parametrize("broken", ["report", "logged_values"])
def test_training_stops_at_the_plateau_though_it_cannot_be_told(framework, broken, tmp_path, monkeypatch):
    def run(folder: str) -> int:
        callbacks = [
            FRAMEWORKS[framework][1](1, probe=probe()),
            PACKAGES[framework].PlateauStopping("matrix_entropy/last", min_delta=99, patience=1, mode="any"),
        ]
        return train(framework, Way(), tmp_path / folder, callbacks).steps

    stopped_at = run("right")
    assert stopped_at < STEPS
    monkeypatch.setattr(PlateauObserver, broken, fails)
    with pytest.warns(UserWarning, match="boom Training goes on"):
        assert run("broken") == stopped_at
