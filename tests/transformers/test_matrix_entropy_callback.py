"""The Hugging Face callback on a real Trainer."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from matent_callbacks.monitor.recording import Recording
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, slow_pooled_entropy, text_examples
from tests.wandb_history import read_history

KEY = "matrix_entropy/last"


def records(trainer: Any, key: str = KEY) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if key in record]


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class ReadEachForward:
    """An independent reading: hidden states of every forward, by the model's own means."""

    def __init__(self, model: Any) -> None:
        self.states: list[tuple[torch.Tensor, ...]] = []
        self.masks: list[torch.Tensor] = []
        forward = model.forward

        @functools.wraps(forward)
        def spy(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **{**kwargs, "output_hidden_states": True})
            self.states.append(tuple(h.detach().clone() for h in output.hidden_states))
            self.masks.append(kwargs["attention_mask"].clone())
            return output

        model.forward = spy


@pytest.mark.parametrize("with_probe", [False, True])
def test_training_is_bitwise_the_same(make_trainer, with_probe):
    def run(callback: MatrixEntropyCallback | None) -> tuple[list[Any], dict[str, torch.Tensor], torch.Tensor]:
        trainer = make_trainer(
            [callback] if callback else [],
            max_steps=30,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="steps",
            save_steps=15,
            dataloader_num_workers=0,
        )
        trainer.train()
        logged = [(r["step"], r[k]) for r in trainer.state.log_history for k in ("loss", "eval_loss") if k in r]
        assert len(logged) == 33
        assert not callback or len(records(trainer)) == 10
        return logged, trainer.model.state_dict(), torch.get_rng_state()

    probe = collate(text_examples(4, start=200)) if with_probe else None
    callback = MatrixEntropyCallback(3, layers="all", probe=probe, metrics=["matrix_entropy", "rankme"])
    losses, weights, rng = run(None)
    losses_with, weights_with, rng_with = run(callback)
    assert losses == losses_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert torch.equal(rng, rng_with)


def test_probe_describes_the_model_after_the_update_and_in_the_end_the_saved_one(make_trainer):
    probe = collate(text_examples(5, start=300))
    trainer = make_trainer([MatrixEntropyCallback(4, probe=probe)], max_steps=6)
    trainer.train()
    assert [r["step"] for r in records(trainer)] == [4, 6]
    model = trainer.model.eval()
    with torch.no_grad():
        hidden = model(**probe, output_hidden_states=True).hidden_states[-1]
    expected = slow_pooled_entropy(hidden, probe["attention_mask"])
    assert records(trainer)[-1][KEY] == pytest.approx(expected, rel=1e-5)


def test_probe_at_the_end_describes_the_best_model_where_that_is_loaded(make_trainer):
    probe = collate(text_examples(5, start=300))
    trainer = make_trainer(
        [MatrixEntropyCallback(2, probe=probe)],
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst: the first checkpoint, so that it is not the last model
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    first, last = records(trainer)[0], records(trainer)[-1]
    assert last["step"] == 6
    assert last[KEY] == first[KEY]


def test_several_probe_batches_are_pooled(make_trainer):
    batches = [collate(text_examples(4, start=300)), collate(text_examples(4, start=304))]
    callbacks = [MatrixEntropyCallback(1, probe=p) for p in (batches, collate(text_examples(8, start=300)))]
    values = []
    for callback in callbacks:
        trainer = make_trainer([callback], max_steps=1)
        trainer.train()
        values.append(records(trainer)[0][KEY])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_evaluation_reads_every_batch_and_nothing_else(make_trainer, make_llama):
    model = make_llama()
    trainer = make_trainer([MatrixEntropyCallback(100, layers="all")], model=model)
    spy = ReadEachForward(model)
    metrics = trainer.evaluate()
    assert len(spy.states) == 3
    hidden = [(h[i], m[i]) for s, m in zip(spy.states, spy.masks, strict=True) for h in [s[-1]] for i in range(len(h))]
    longest = max(len(h) for h, _ in hidden)
    rows = torch.stack([nn.functional.pad(h, (0, 0, 0, longest - len(h))) for h, _ in hidden])
    mask = torch.stack([nn.functional.pad(m, (0, longest - len(m))) for _, m in hidden])
    assert rows.shape[0] == 10
    assert metrics["eval_matrix_entropy/last"] == pytest.approx(slow_pooled_entropy(rows, mask), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_matrix_entropy/last"] == metrics["eval_matrix_entropy/last"]


def test_callback_added_later_still_sees_the_first_evaluation_batch(make_trainer, make_llama):
    expected = make_trainer([MatrixEntropyCallback(100)]).evaluate()["eval_matrix_entropy/last"]
    trainer = make_trainer([])
    trainer.add_callback(MatrixEntropyCallback(100))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_matrix_entropy/last"] == pytest.approx(expected, rel=1e-6)
    assert second["eval_matrix_entropy/last"] == pytest.approx(expected, rel=1e-6)
    assert hooks_on(trainer.model) == 0


def test_callback_added_later_works_in_training_and_can_be_removed(make_trainer):
    trainer = make_trainer([])
    callback = MatrixEntropyCallback(3)
    trainer.add_callback(callback)
    trainer.train()
    assert [r["step"] for r in records(trainer)] == [3, 6]
    trainer.remove_callback(callback)
    assert "eval_matrix_entropy/last" not in trainer.evaluate()


def test_prefixes_of_several_evaluation_sets_and_of_predict(make_trainer):
    trainer = make_trainer([MatrixEntropyCallback(100)])
    trainer.eval_dataset = {"short": text_examples(4, 12, start=400), "long": text_examples(4, 30, start=400)}
    metrics = trainer.evaluate()
    assert metrics["eval_short_matrix_entropy/last"] < metrics["eval_long_matrix_entropy/last"]
    assert "test_matrix_entropy/last" in trainer.predict(text_examples(4)).metrics


def test_best_model_and_early_stopping_by_effective_rank(make_trainer):
    from transformers import EarlyStoppingCallback

    trainer = make_trainer(
        [MatrixEntropyCallback(100), EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e6)],
        max_steps=10,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_effective_rank/last",
        greater_is_better=False,
    )
    trainer.train()
    values = [r["eval_effective_rank/last"] for r in records(trainer, "eval_effective_rank/last")]
    # No improvement beats a threshold of 1e6, so the second evaluation ends the run.
    assert len(values) == 2
    assert trainer.state.best_metric == min(values)


def test_reporters_hold_the_values_in_the_record_of_the_loss(make_trainer, own_wandb, tmp_path: Path):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        [MatrixEntropyCallback(2)], report_to=["tensorboard", "wandb"], eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    wandb.finish()
    logged = {r["step"]: r[KEY] for r in records(trainer)}
    assert sorted(logged) == [2, 4, 6]

    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    read = {e.step: e.value for e in events.Scalars("train/matrix_entropy/last")}
    assert read == {step: pytest.approx(value) for step, value in logged.items()}
    assert [e.step for e in events.Scalars("eval/matrix_entropy/last")] == [3, 6]

    history = read_history(own_wandb / "wandb")
    with_entropy = [row for row in history if "train/matrix_entropy/last" in row]
    assert {row["train/global_step"]: row["train/matrix_entropy/last"] for row in with_entropy} == logged
    assert all("train/loss" in row for row in with_entropy)


def test_in_the_background_the_values_stand_under_their_steps_and_training_is_the_same(make_trainer, tmp_path):
    def run(background: bool, **arguments: Any) -> Any:
        given = {"layers": "all", "background": background, **arguments}
        trainer = make_trainer([MatrixEntropyCallback(2, **given)], max_steps=7, save_strategy="steps", save_steps=5)
        trainer.train()
        return trainer

    for arguments in ({}, {"probe": collate(text_examples(4, start=50)), "reference": "start"}):
        later, at_once = run(True, **arguments), run(False, **arguments)
        keys = [key for key in at_once.state.log_history[1] if "/" in key]
        for key in (*keys, "loss"):
            logged = [
                {r["step"]: r[key] for r in trainer.state.log_history if key in r} for trainer in (later, at_once)
            ]
            assert len(logged[0]) >= 3
            assert logged[0] == logged[1], key
        # What had been read before the checkpoint is in it.
        state = json.loads((Path(later.args.output_dir) / "checkpoint-5" / "trainer_state.json").read_text())
        assert [r["step"] for r in state["log_history"] if KEY in r] == [2, 4]


def test_a_reading_in_the_background_does_not_take_that_of_another_callback_under_its_step(make_trainer):
    def run(callbacks: list[Any]) -> dict[str, dict[int, float]]:
        trainer = make_trainer(callbacks, max_steps=5)
        trainer.train()
        keys = {key for record in trainer.state.log_history for key in record if "/" in key}
        return {key: {r["step"]: r[key] for r in trainer.state.log_history if key in r} for key in keys}

    def late() -> MatrixEntropyCallback:
        return MatrixEntropyCallback(2, metrics="rankme", background=True)

    expected = run([MatrixEntropyCallback(1)]) | run([late()])
    assert {key: sorted(values) for key, values in expected.items()} == {
        KEY: [1, 2, 3, 4, 5],
        "effective_rank/last": [1, 2, 3, 4, 5],
        "rankme/last": [2, 4],
    }
    assert run([MatrixEntropyCallback(1), late()]) == expected
    assert run([late(), MatrixEntropyCallback(1)]) == expected


@pytest.mark.parametrize("pictures", [True, False])
def test_two_pictures_hold_all_layers(pictures, make_trainer, own_wandb, tmp_path: Path):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        [MatrixEntropyCallback(1, layers="all", pictures=pictures)], max_steps=8, report_to=["tensorboard", "wandb"]
    )
    trainer.train()
    wandb.finish()
    names = {f"layers/effective_rank_{kind}" for kind in ("profile", "heatmap")}
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent), {"images": 0})
    events.Reload()
    if not pictures:
        assert not events.Tags()["images"]
        assert not list(own_wandb.rglob("*.png"))
        return
    assert set(events.Tags()["images"]) == names
    # Ever more rarely, and at the end.
    steps = [image.step for image in events.Images("layers/effective_rank_profile")]
    assert steps == [2, 3, 4, 5, 7, 8]
    rows = [row for row in read_history(own_wandb / "wandb") if any(key.startswith(min(names)) for key in row)]
    assert [row["train/global_step"] for row in rows] == steps
    assert len(list(own_wandb.rglob("*.png"))) == 2 * len(steps)


def test_one_layer_makes_no_picture(make_trainer, own_wandb, tmp_path: Path):
    import wandb

    make_trainer([MatrixEntropyCallback(1)], max_steps=3, report_to=["wandb"]).train()
    wandb.finish()
    assert not list(own_wandb.rglob("*.png"))


def test_every_n_steps_must_be_a_positive_whole_number():
    for wrong in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=r"`every_n_steps` must be a whole number above 0, got"):
            MatrixEntropyCallback(wrong)


def test_unknown_names_are_told_before_training_with_near_matches(make_trainer):
    with pytest.raises(ValueError, match=r"`metrics` asks for 'matrix_entropie'.*matrix_entropy"):
        MatrixEntropyCallback(metrics=["matrix_entropie"])
    with pytest.raises(ValueError, match=r"`layers` asks for 'model.layer.1'.*model.layers.1"):
        make_trainer([MatrixEntropyCallback(layers="model.layer.1")])


def test_all_padded_step_is_nan_with_a_warning(make_trainer):
    trainer = make_trainer([MatrixEntropyCallback(1)], max_steps=2)
    for example in trainer.train_dataset:
        example["attention_mask"] = [0] * len(example["attention_mask"])
    with pytest.warns(
        UserWarning, match="Too few valid tokens or sequences were seen, so there is no reading of: last"
    ):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(math.isnan(record[KEY]) for record in records(trainer))


@pytest.mark.filterwarnings("default:Reading layer")
def test_an_exception_in_monitoring_warns_once_with_the_layer_and_training_goes_on(make_trainer, monkeypatch):
    class Fails:
        def update(self, *args: Any) -> None:
            raise RuntimeError("boom")

    original = Recording.record

    def with_one_broken(self: Any, layer: str, *args: Any) -> None:
        accumulators = self.accumulators
        self.accumulators = {**accumulators, "layer_01": Fails()}
        try:
            original(self, layer, *args)
        finally:
            self.accumulators = accumulators

    monkeypatch.setattr(Recording, "record", with_one_broken)
    trainer = make_trainer([MatrixEntropyCallback(1, layers="all")])
    with pytest.warns(UserWarning, match="boom") as caught:
        trainer.train()
    messages = [str(w.message) for w in caught if "boom" in str(w.message)]
    assert len(messages) == 1
    assert "'layer_01'" in messages[0]
    assert trainer.state.global_step == 6
    assert len(records(trainer)) == 6
    assert not records(trainer, "matrix_entropy/layer_01")


def test_on_error_raise_raises(make_trainer, monkeypatch):
    from matent_callbacks.accumulate import layer_statistics

    def fails(self: Any, *args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(layer_statistics.LayerAccumulator, "update", fails)
    with pytest.raises(RuntimeError, match="Reading layer 'last' failed: boom"):
        make_trainer([MatrixEntropyCallback(1, on_error="raise")]).train()


@pytest.mark.filterwarnings("default:Monitoring failed")
def test_a_probe_that_does_not_fit_the_model_warns_and_training_goes_on(make_trainer):
    trainer = make_trainer([MatrixEntropyCallback(2, probe={"pixels": torch.zeros(1)})])
    with pytest.warns(UserWarning, match="Monitoring failed: ValueError: You must specify exactly one of input_ids"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.model.training


def test_max_tokens_bounds_what_is_read(make_trainer, make_llama):
    model = make_llama(dropout=0.0)
    spy = ReadEachForward(model)
    trainer = make_trainer([MatrixEntropyCallback(1, max_tokens=20)], model=model, max_steps=1)
    trainer.train()
    hidden, mask = spy.states[0][-1][:1].clone(), spy.masks[0][:1].clone()
    if mask.shape[1] < 20:
        pytest.fail("the first sequence must fill the budget for this test to say anything")
    mask[:, 20:] = 0
    assert records(trainer)[0][KEY] == pytest.approx(slow_pooled_entropy(hidden, mask), rel=1e-5)


def test_mask_goes_before_the_models_own(make_trainer, make_llama):
    def without_first(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"].clone()
        mask[:, 0] = 0
        return mask

    model = make_llama()
    trainer = make_trainer([MatrixEntropyCallback(1, mask=without_first)], model=model, max_steps=1)
    spy = ReadEachForward(model)
    trainer.train()
    (states,), (mask,) = spy.states, spy.masks
    assert records(trainer)[0][KEY] == pytest.approx(slow_pooled_entropy(states[-1][:, 1:], mask[:, 1:]), rel=1e-5)


def test_a_mask_that_cannot_be_made_costs_the_reading_only(make_trainer):
    def broken(batch: Any) -> torch.Tensor:
        raise KeyError("no mask")

    trainer = make_trainer([MatrixEntropyCallback(1, mask=broken)], max_steps=2)
    with pytest.warns(UserWarning, match="no mask"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(math.isnan(record[KEY]) for record in records(trainer))


def test_progress_bar_shows_the_readings_of_all_that_are_asked_to(make_trainer, capsys):
    callbacks = [
        MatrixEntropyCallback(2, prog_bar=True),
        MatrixEntropyCallback(2, layers=[1], metrics="rankme", prog_bar=True),
        MatrixEntropyCallback(2, layers=[2]),
    ]
    trainer = make_trainer(callbacks, disable_tqdm=False, max_steps=2)
    trainer.train()
    record = records(trainer)[0]
    beside_the_bar = capsys.readouterr().err
    for key in (KEY, "effective_rank/last", "rankme/layer_01"):
        assert f"{key}={record[key]:.3g}" in beside_the_bar
    assert "layer_02" not in beside_the_bar
