"""Adapters, packed documents, resumed series and references of the Trainer; the ways to train are in tests/sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import untrained_like
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, slow_entropy, slow_pooled_entropy, text_examples


def series(trainer: Any, *keys: str) -> dict[int, tuple[float, ...]]:
    """Step to values, of the records that have all keys; what came last at a step."""
    return {
        record["step"]: tuple(record[key] for key in keys)
        for record in trainer.state.log_history
        if all(key in record for key in keys)
    }


def test_the_name_of_an_adapter(make_trainer, make_llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    seen: list[torch.Tensor] = []
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default
    adapter.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    name = "model.layers.0.self_attn.q_proj.lora_A.default"
    trainer = make_trainer([MatrixEntropyCallback(1, name)], model=model, max_steps=1)
    for example in trainer.train_dataset:
        example.update({key: values[:12] for key, values in example.items()})  # no padding
    trainer.train()
    (reading,) = series(trainer, f"matrix_entropy/{name}")[1]
    assert reading == pytest.approx(slow_pooled_entropy(seen[0]), rel=1e-5)


@pytest.mark.parametrize("first", [0, 2])  # RoBERTa counts from 2
def test_packed_documents_are_sequences_of_their_own(first, make_llama):
    from matent_callbacks import EntropyMonitor

    model = make_llama(dropout=0.0).eval()
    lengths = [7, 12, 5]
    ids = torch.tensor([example["input_ids"] for example in text_examples(1, 24, start=31)])
    positions = torch.cat([first + torch.arange(length) for length in lengths]).unsqueeze(0)
    monitor = EntropyMonitor(model, "all", metrics=["matrix_entropy", "sequence_matrix_entropy"], dtype=torch.float64)
    with monitor, torch.no_grad():
        hidden = model(input_ids=ids, position_ids=positions, output_hidden_states=True).hidden_states
    readings = monitor.compute()
    for name, states in (("layer_00", hidden[0]), ("last", hidden[-1])):
        documents = states[0].split(lengths)
        expected = sum(map(slow_entropy, documents)) / 3
        assert readings[f"sequence_matrix_entropy/{name}"] == pytest.approx(expected, abs=1e-9)
    # One row of counting positions is no packing.
    with monitor, torch.no_grad():
        hidden = model(input_ids=ids, position_ids=torch.arange(24).unsqueeze(0), output_hidden_states=True)
    whole = slow_entropy(hidden.hidden_states[-1][0])
    assert monitor.compute()["sequence_matrix_entropy/last"] == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("packing", [True, False])
def test_sft_trainer_does_not_merge_documents(make_llama, tmp_path: Path, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = make_llama(dropout=0.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((output.last_hidden_state.detach(), kwargs["position_ids"]))

    model.model.register_forward_hook(spy, with_kwargs=True)
    data = Dataset.from_list([{"input_ids": e["input_ids"]} for e in text_examples(24)])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            packing=packing,
            padding_free=True,
            max_length=48 if packing else None,
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            pad_token="<pad>",
        ),
        train_dataset=data,
        processing_class=_tokenizer(),
        callbacks=[MatrixEntropyCallback(1, metrics="sequence_matrix_entropy")],
    )
    trainer.train()
    for step, (hidden, positions) in enumerate(seen, start=1):
        starts = (positions[0] == 0).nonzero().flatten().tolist()
        documents = hidden[0].tensor_split(starts[1:])
        assert len(documents) > 1
        expected = sum(map(slow_entropy, documents)) / len(documents)
        (reading,) = series(trainer, "sequence_matrix_entropy/last")[step]
        assert reading == pytest.approx(expected, rel=1e-5)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{chr(i): i for i in range(2, 128)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("restore_flag", [False, True])
def test_resumed_series_is_that_of_the_uninterrupted_run(make_trainer, make_llama, tmp_path, restore_flag):
    probe = collate(text_examples(4, start=300))

    def callbacks() -> list[Any]:
        metrics = ("matrix_entropy", "drift", "subspace_overlap", "token_cosine")
        return [
            MatrixEntropyCallback(2, metrics=metrics, probe=probe, reference="start"),
            MatrixEntropyCallback(3, [0, 1]),
        ]

    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "output_dir": str(tmp_path / "checkpoints")}
    whole = make_trainer(callbacks(), **settings)
    whole.train()
    resumed = make_trainer(
        callbacks(), model=make_llama(seed=9), restore_callback_states_from_checkpoint=restore_flag, **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-6"))
    moved = ("drift/last", "subspace_overlap/last", "token_cosine/last")
    for keys in (("matrix_entropy/last", "diff_erank/last"), ("matrix_entropy/layer_01",), moved):
        expected = series(whole, *keys)
        assert len(expected) > 3
        assert series(resumed, *keys) == expected


def test_reference_from_the_start_or_from_a_model(make_trainer, make_llama):
    probe = collate(text_examples(6, start=300))

    def rank(model: Any) -> float:
        with torch.no_grad():
            hidden = model.eval()(**probe, output_hidden_states=True).hidden_states[-1]
        values = [slow_entropy(h, m) for h, m in zip(hidden, probe["attention_mask"], strict=True)]
        return torch.tensor(values).mean().exp().item()

    start, other = rank(make_llama()), make_llama(seed=5)
    for reference, before in (("start", start), (other, rank(other))):
        trainer = make_trainer([MatrixEntropyCallback(3, probe=probe, reference=reference)], max_steps=3)
        trainer.train()
        (difference,) = series(trainer, "diff_erank/last")[3]
        assert difference == pytest.approx(before - rank(trainer.model), abs=1e-4)
        assert not series(trainer, "sequence_effective_rank/last")  # not asked for


def test_reference_needs_a_probe_and_to_be_known():
    with pytest.raises(ValueError, match="`reference` needs a `probe`"):
        MatrixEntropyCallback(reference="start")
    with pytest.raises(ValueError, match="`reference` must be 'start', a model or None, got 'end'"):
        MatrixEntropyCallback(reference="end", probe={})


def test_untrained_like_is_the_architecture_without_the_training(make_llama):
    from peft import LoraConfig, get_peft_model

    model = make_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    for wrapped in (model, get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))):
        fresh = untrained_like(wrapped, seed=3)
        assert type(fresh) is type(model)
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in state.items()}
        assert abs(fresh.model.layers[0].mlp.up_proj.weight.mean().item()) < 0.01
        assert not fresh.training
    before_second = torch.get_rng_state()
    assert torch.equal(untrained_like(model, seed=3).lm_head.weight, fresh.lm_head.weight)
    assert not torch.equal(untrained_like(model, seed=4).lm_head.weight, fresh.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), before_second)
    assert before.shape == before_second.shape
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_untrained_like_of_a_module_of_ones_own():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.TransformerEncoder(layer, 2))
    random = torch.get_rng_state()
    fresh = untrained_like(model)
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in fresh.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, model.get_parameter(name)), name

    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"0 \(Scale\) has scale and no reset_parameters method"):
        untrained_like(torch.nn.Sequential(Scale()))
