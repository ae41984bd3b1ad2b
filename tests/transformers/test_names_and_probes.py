"""Several callbacks and several probes in one Trainer, and readings of several steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from matent_callbacks import untrained_like
from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback
from tests.conftest import collate, slow_pooled_entropy, text_examples
from tests.pairs import clip_examples, collate_pairs, make_clip
from tests.transformers.test_alignment_callback import make_trainer as make_pair_trainer
from tests.transformers.test_matrix_entropy_callback import ReadEachForward

PROBES = {"english": collate(text_examples(4, start=300)), "german": [collate(text_examples(4, start=400))]}


def logged(trainer: Any, key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in trainer.state.log_history if key in r]


def alone(make_trainer: Any, key: str, callback: MatrixEntropyCallback, **arguments: Any) -> list[tuple[int, float]]:
    trainer = make_trainer([callback], **arguments)
    trainer.train()
    return logged(trainer, key)


def test_names_keep_two_callbacks_with_the_same_layers_apart(make_trainer):
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}
    of_probe = {name: {"probe": probe, "reference": "start"} for name, probe in PROBES.items()}
    callbacks = [MatrixEntropyCallback(2, name=name, **arguments) for name, arguments in of_probe.items()]
    trainer = make_trainer([*callbacks, MatrixEntropyCallback(2)], **settings)
    trainer.train()
    for name, arguments in of_probe.items():
        for key in ("matrix_entropy/last", "diff_erank/last", "effective_rank/last"):
            found = logged(trainer, f"{name}/{key}")
            assert [step for step, _ in found] == [2, 4, 6]
            assert found == alone(make_trainer, key, MatrixEntropyCallback(2, **arguments), **settings)
        assert len(logged(trainer, f"eval_{name}/matrix_entropy/last")) == 2
    expected = alone(make_trainer, "matrix_entropy/last", MatrixEntropyCallback(2), **settings)
    assert logged(trainer, "matrix_entropy/last") == expected
    assert logged(trainer, "english/matrix_entropy/last") != logged(trainer, "german/matrix_entropy/last")


def test_states_of_named_callbacks_are_apart_in_a_checkpoint(make_trainer, tmp_path):
    def trainer(**settings: Any) -> tuple[Any, list[MatrixEntropyCallback]]:
        callbacks = [MatrixEntropyCallback(2, name=name, probe=p, reference="start") for name, p in PROBES.items()]
        arguments = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "checkpoints")}
        return make_trainer(callbacks, **arguments, **settings), callbacks

    first, callbacks = trainer(max_steps=2)
    first.train()
    references = [callback.state_dict() for callback in callbacks]
    assert references[0] != references[1]
    resumed, callbacks = trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert [callback.state_dict() for callback in callbacks] == references


@pytest.mark.parametrize("background", [False, True])
def test_one_callback_with_several_probes_reads_what_several_do(make_trainer, background):
    arguments = {"layers": "all", "metrics": ("matrix_entropy", "effective_rank"), "reference": "start"}
    several = MatrixEntropyCallback(2, probe=PROBES, background=background, **arguments)
    trainer = make_trainer([several])
    trainer.train()
    for name, probe in PROBES.items():
        for key in ("matrix_entropy/layer_01", "diff_erank/last"):
            expected = alone(make_trainer, key, MatrixEntropyCallback(2, probe=probe, **arguments))
            assert [step for step, _ in expected] == [2, 4, 6]
            found = logged(trainer, f"{name}/{key}")
            assert [step for step, _ in found] == [2, 4, 6]
            assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert not logged(trainer, "matrix_entropy/last")


def test_reference_model_is_measured_on_each_probe(make_trainer, make_llama):
    model = make_llama()
    callback = MatrixEntropyCallback(1, probe=PROBES, name="texts", reference=untrained_like(model, seed=1))
    trainer = make_trainer([callback], model=model, max_steps=1)
    trainer.train()
    (record,) = [r for r in trainer.state.log_history if "texts/english/diff_erank/last" in r]
    assert record["texts/english/diff_erank/last"] != record["texts/german/diff_erank/last"]


def test_pictures_are_apart(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [
        MatrixEntropyCallback(2, layers="all", probe=PROBES),
        MatrixEntropyCallback(2, layers="all", name="training"),
    ]
    make_trainer(callbacks, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    assert set(events.Tags()["images"]) == {
        f"{name}/layers/effective_rank_{kind}"
        for name in ("english", "german", "training")
        for kind in ("profile", "heatmap")
    }


@pytest.mark.parametrize(
    ("others", "key"),
    [
        ({"layers": [1, "last"], "metrics": "effective_rank"}, "effective_rank/last"),
        ({"probe": PROBES["english"], "every_n_steps": 7}, "effective_rank/last' and more"),
    ],
)
def test_two_that_would_log_the_same_names_are_an_error_when_the_trainer_is_made(make_trainer, others, key):
    with pytest.raises(ValueError, match=f"Two callbacks would log '{key}.*give one of them a `name`"):
        make_trainer([MatrixEntropyCallback(2), MatrixEntropyCallback(**others)])
    make_trainer([MatrixEntropyCallback(2), MatrixEntropyCallback(**others, name="other")])
    make_trainer(
        [MatrixEntropyCallback(2), MatrixEntropyCallback(2, layers=[1]), MatrixEntropyCallback(metrics="rankme")]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, r"`name` must be a text without '/', or None, got 'a/b'"),
        ({"name": ""}, r"`name` must be a text without '/', or None, got ''"),
        ({"probe": {}}, r"`probe` must hold at least one batch or one named probe, got none"),
        ({"probe": {"a/b": PROBES["english"]}}, r"`name` must be .* got 'a/b'"),
        ({"window_steps": 0}, r"`window_steps` must be a whole number from 1 to `every_n_steps`, 4, got 0"),
        ({"window_steps": 5}, r"`window_steps` must be a whole number from 1 to `every_n_steps`, 4, got 5"),
        ({"window_steps": 2, "probe": PROBES["english"]}, r"`window_steps` is for training forwards"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixEntropyCallback(4, **arguments)


def test_alignment_of_several_probes_and_callbacks(tmp_path):
    examples = clip_examples(48)
    probes = {"first": collate_pairs(examples[:16]), "second": [collate_pairs(examples[16:32])]}

    def trained(*callbacks: AlignmentCallback) -> Any:
        model = make_clip()
        model.forward = functools.partial(model.forward, return_loss=True)
        trainer = make_pair_trainer(tmp_path, list(callbacks), model=model, examples=examples, max_steps=2)
        trainer.train()
        return trainer

    trainer = trained(AlignmentCallback(1, probe=probes), AlignmentCallback(1, probe=probes["first"], name="again"))
    for prefix, probe in (("first/", probes["first"]), ("second/", probes["second"]), ("again/", probes["first"])):
        expected = logged(trained(AlignmentCallback(1, probe=probe)), "alignment/cka_debiased")
        assert logged(trainer, f"{prefix}alignment/cka_debiased") == expected
        assert [step for step, _ in expected] == [1, 2]
    with pytest.raises(ValueError, match=r"Two `AlignmentCallback`s would log the same values.*give one of them"):
        trained(AlignmentCallback(1, probe=probes["first"]), AlignmentCallback(2, probe=probes["second"]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_window_covers_the_last_steps_and_no_other(make_trainer, make_llama, accumulation):
    model = make_llama()
    callback = MatrixEntropyCallback(4, window_steps=3)
    trainer = make_trainer([callback], model=model, max_steps=9, gradient_accumulation_steps=accumulation)
    spy = ReadEachForward(model)
    trainer.train()
    found = logged(trainer, "matrix_entropy/last")
    assert [step for step, _ in found] == [4, 8]
    for step, value in found:
        window = slice((step - 3) * accumulation, step * accumulation)
        expected = pooled(spy.states[window], spy.masks[window])
        assert value == pytest.approx(expected, rel=1e-5)


def pooled(states: list[tuple[torch.Tensor, ...]], masks: list[torch.Tensor]) -> float:
    longest = max(mask.shape[1] for mask in masks)
    assert len(states) >= 3
    rows = torch.cat([nn.functional.pad(s[-1], (0, 0, 0, longest - s[-1].shape[1])) for s in states])
    return slow_pooled_entropy(rows, torch.cat([nn.functional.pad(m, (0, longest - m.shape[1])) for m in masks]))
