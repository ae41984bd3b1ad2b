"""Probes in a Trainer: what they are run through, with which mask, and what is told of those that cannot be run."""

from __future__ import annotations

import math
import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn

from matent_callbacks import EntropyMonitor
from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback
from tests.conftest import collate, slow_pooled_entropy, text_examples

KEY = "matrix_entropy/last"
PROBE = collate(text_examples(6, start=300))
NAMED = {"tokens": PROBE["input_ids"], "mask": PROBE["attention_mask"], "target": PROBE["labels"]}


def logged(trainer: Any, key: str = KEY) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]


def last_hidden_states(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch, output_hidden_states=True).hidden_states[-1]


def peft_model(kind: str, model: Any) -> Any:
    import peft

    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    }
    return peft.get_peft_model(model, configs[kind]())


class Wrapper(nn.Module):
    """A model of the user's around one of transformers: it trains a shift of the embeddings, and renames arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(model.config.hidden_size))

    def forward(self, tokens: Any, mask: Any, target: Any = None) -> Any:
        embedded = self.net.get_input_embeddings()(tokens) + self.shift
        return self.net(inputs_embeds=embedded, attention_mask=mask, labels=target)


def rename(examples: list[Any]) -> dict[str, Any]:
    batch = collate(examples)
    return {"tokens": batch["input_ids"], "mask": batch["attention_mask"], "target": batch["labels"]}


@pytest.fixture
def wrapped_trainer(make_trainer, make_llama):
    def make(callbacks: list[Any], **arguments: Any) -> Any:
        trainer = make_trainer(callbacks, model=Wrapper(make_llama()), learning_rate=0.1, **arguments)
        trainer.data_collator = rename
        trainer.args.remove_unused_columns = False
        return trainer

    return make


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix", "lora"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_probe_is_read_with_peft_around_the_model(make_trainer, make_llama, kind, labels):
    probe = PROBE if labels else {key: value for key, value in PROBE.items() if key != "labels"}
    model = peft_model(kind, make_llama())
    trainer = make_trainer([MatrixEntropyCallback(2, probe=probe, reference="start")], model=model, learning_rate=0.05)
    trainer.train()
    readings = logged(trainer)
    assert len(set(readings)) == 3
    assert all(logged(trainer, "diff_erank/last"))
    hidden = last_hidden_states(model, **probe)
    extra = hidden.shape[1] - probe["input_ids"].shape[1]
    assert extra == (5 if kind in ("prompt", "p") else 0)
    mask = torch.cat([torch.ones(len(hidden), extra, dtype=torch.long), probe["attention_mask"]], 1)
    assert readings[-1] == pytest.approx(slow_pooled_entropy(hidden, mask), rel=1e-4)


def test_a_module_around_the_model_is_run_by_its_own_forward_if_the_names_fit(wrapped_trainer):
    trainer = wrapped_trainer([MatrixEntropyCallback(2, probe=NAMED, reference="start")])
    trainer.train()
    readings = logged(trainer)
    assert len(set(readings)) == 3
    model = trainer.model
    embedded = model.net.get_input_embeddings()(NAMED["tokens"]) + model.shift
    hidden = last_hidden_states(model.net, inputs_embeds=embedded, attention_mask=NAMED["mask"])
    assert readings[-1] == pytest.approx(slow_pooled_entropy(hidden, NAMED["mask"]), rel=1e-4)


def test_a_probe_that_the_trained_weights_have_no_influence_on_is_told_once(wrapped_trainer, recwarn):
    # The names are those of the model inside, which is frozen.
    trainer = wrapped_trainer([MatrixEntropyCallback(1, probe={"english": PROBE})])
    trainer.train()
    assert len(set(logged(trainer, f"english/{KEY}"))) == 1
    told = [str(w.message) for w in recwarn if "no influence" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith(
        "3 readings of `probe` 'english' in a row are the same, although the weights have changed"
    )


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("steps", [2, 3])
def test_it_is_told_at_the_third_reading(wrapped_trainer, recwarn, steps, background):
    wrapped_trainer([MatrixEntropyCallback(1, probe=PROBE, background=background)], max_steps=steps).train()
    assert any("no influence" in str(w.message) for w in recwarn) == (steps == 3)


@pytest.mark.parametrize("case", ["no learning rate", "whole numbers", "ordinary", "not a number"])
def test_it_is_not_told_of_other_readings_that_stay(make_trainer, make_llama, recwarn, case):
    metrics = "numerical_rank" if case == "whole numbers" else "matrix_entropy"
    rate = {"no learning rate": 0.0, "whole numbers": 1e-9}.get(case, 1e-3)
    model = make_llama()
    if case == "not a number":
        model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    trainer = make_trainer([MatrixEntropyCallback(1, probe=PROBE, metrics=metrics)], learning_rate=rate, model=model)
    trainer.train()
    assert not [str(w.message) for w in recwarn if "no influence" in str(w.message)]


@pytest.mark.filterwarnings("default:Monitoring failed")
def test_a_probe_whose_forward_fails_is_told_with_its_error_alone(make_trainer, make_llama):
    for model, probe, expected in (
        (
            make_llama(),
            {"pixels": torch.zeros(1)},
            r"ValueError: You must specify.*run as LlamaForCausalLM\(pixels\)\.\) Training",
        ),
        (
            Wrapper(make_llama()),
            {"mask": PROBE["attention_mask"]},
            r"since Wrapper.forward\(tokens.* does not take these",
        ),
    ):
        trainer = make_trainer([MatrixEntropyCallback(2, probe=probe, reference="start")], model=model)
        trainer.data_collator = rename if isinstance(model, Wrapper) else collate
        trainer.args.remove_unused_columns = False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(w.message) for w in caught if "MatrixEntropy" in str(w.message) or "reading" in str(w.message)]
        assert len(told) == 1
        with pytest.warns(UserWarning, match=f"Monitoring failed: .*{expected}.*without the forwards of `probe`"):
            warnings.warn(told[0], stacklevel=1)
        assert all(math.isnan(value) for value in logged(trainer))


def test_nothing_is_logged_of_a_probe_of_which_one_batch_fails(make_trainer):
    probe = {"half": [PROBE, {"x": torch.ones(1)}], "all": [PROBE]}
    trainer = make_trainer([MatrixEntropyCallback(2, probe=probe)])
    with pytest.warns(UserWarning, match="without the forwards of `probe` 'half'"):
        trainer.train()
    assert all(math.isnan(value) for value in logged(trainer, f"half/{KEY}"))
    assert len(logged(trainer, f"all/{KEY}")) == 3


def first_half(batch: Any) -> torch.Tensor:
    mask = batch["attention_mask"].clone()
    mask[:, mask.shape[1] // 2 :] = 0
    return mask


@pytest.mark.parametrize("named", [False, True])
def test_mask_holds_for_the_probe_and_the_reference(make_trainer, named):
    batches = [PROBE, collate(text_examples(4, 20, start=400))]
    probe, prefix = ({"some": batches}, "some/") if named else (batches, "")
    callback = MatrixEntropyCallback(
        2, probe=probe, reference="start", mask=first_half, metrics=("matrix_entropy", "sequence_effective_rank")
    )
    trainer = make_trainer([callback], max_steps=2)
    before = EntropyMonitor(trainer.model, metrics="sequence_effective_rank")
    before.read(batches, attention_mask=first_half)
    start = before.compute()["sequence_effective_rank/last"]
    trainer.train()
    hidden = [last_hidden_states(trainer.model, **batch) for batch in batches]
    length = max(len(h[0]) for h in hidden)
    padded = torch.cat([nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in hidden])
    masks = torch.cat([nn.functional.pad(m, (0, length - m.shape[1])) for m in map(first_half, batches)])
    (value,) = logged(trainer, f"{prefix}{KEY}")
    assert value == pytest.approx(slow_pooled_entropy(padded, masks), rel=1e-4)
    (rank,), (difference,) = (
        logged(trainer, f"{prefix}{key}") for key in ("sequence_effective_rank/last", "diff_erank/last")
    )
    assert difference == pytest.approx(start - rank, abs=1e-5)


def generator() -> Any:
    yield PROBE


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list(text_examples(4))


ROWS = text_examples(4)
LISTS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
MISTAKES = {
    "rows": (ROWS, "a list whose item 0 is a dict without a tensor \\('input_ids': list"),
    "columns": (LISTS, "a dict without a tensor"),
    "lists from a tokenizer": (UserDict(LISTS), "a UserDict without a tensor"),
    "some lists": ({**PROBE, "input_ids": LISTS["input_ids"]}, "a dict whose 'input_ids' is a list"),
    "text": ("some text", "a str"),
    "texts": (["some", "texts"], "a list whose item 0 is a str"),
    "ids": ([1, 2, 3], "a list whose item 0 is a int"),
    "lists of ids": ([[1, 2], [3, 4]], "a list whose item 0 is a list without a tensor"),
    "arrays": ({key: value.numpy() for key, value in PROBE.items()}, "a dict without a tensor"),
    "loader": (torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=collate), "a DataLoader"),
    "generator": (generator(), "a generator"),
    "data set": (dataset(), "a Dataset"),
    "empty": ([], "none"),
    "named": ({"english": PROBE, "german": dataset()}, "a dict whose 'german' is a Dataset"),
    "named rows": ({"english": PROBE, "german": ROWS}, "as 'german', a list whose item 0"),
    "named loaders": ({"english": dataset(), "german": dataset()}, "a dict without a tensor"),
    "number": (5, "a int"),
    "true": (True, "a bool"),
}


@pytest.mark.parametrize("callback", [MatrixEntropyCallback, AlignmentCallback])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_batch_is_refused_when_the_callback_is_made(callback, mistake):
    probe, came = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"`probe` must .*got.* {came}"):
        callback(2, probe=probe)


@pytest.mark.parametrize(
    ("probe", "came"),
    [
        ({key: value[0] for key, value in PROBE.items()}, "`input_ids` of shape"),
        ([{key: value[0] for key, value in PROBE.items()}], "`input_ids` of shape"),
        ({"english": PROBE, "german": "some text"}, "'english': dict, 'german': str"),
        ({"english": PROBE, "german": ["some", "texts"]}, "'english': dict, 'german': list"),
    ],
)
def test_what_a_model_of_transformers_cannot_take_is_refused_when_the_trainer_is_made(make_trainer, probe, came):
    with pytest.raises(ValueError, match=f"`probe` must hold batches .*got {came}"):
        make_trainer([MatrixEntropyCallback(2, probe=probe)])


@pytest.mark.parametrize(
    "probe",
    [
        UserDict(PROBE),
        {**PROBE, "return_dict": True, "past_key_values": None},
        [PROBE, UserDict(PROBE)],
        PROBE["input_ids"],
        [(PROBE["input_ids"], PROBE["attention_mask"])],
        (PROBE, PROBE),
    ],
)
def test_all_kinds_of_batches_are_read(make_trainer, probe):
    trainer = make_trainer([MatrixEntropyCallback(2, probe=probe)])
    trainer.train()
    assert len(logged(trainer)) == 3


def test_the_monitor_refuses_what_is_no_batch(make_llama):
    monitor = EntropyMonitor(make_llama())
    for wrong in ("text", ROWS, LISTS):
        with pytest.raises(ValueError, match="`batches` must hold batches as the model takes them"):
            monitor.read(wrong)
    monitor.read(torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=collate))
    assert monitor.compute()
