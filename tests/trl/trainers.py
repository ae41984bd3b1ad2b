"""TRL's trainers on real text, with models and a tokenizer that are made on the spot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.conftest import VOCABULARY, llama, text_examples
from tests.versions import needs

EOS = 1
EVALUATED = 7
STEPS = 4


def tokenizer() -> PreTrainedTokenizerFast:
    """A token is a character, and its id the character's code."""
    words = {"<pad>": 0, "<eos>": EOS, **{chr(i): i for i in range(2, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", model_input_names=names)


def texts(*, start: int, shortest: int) -> list[str]:
    """32 pieces of English text of seven lengths."""
    whole = [example["input_ids"] for example in text_examples(96, start=start)[1::3]]
    return ["".join(map(chr, ids[: shortest + i % 7])) for i, ids in enumerate(whole)]


def pairs() -> list[dict[str, str]]:
    columns = (texts(start=start, shortest=shortest) for start, shortest in ((0, 8), (200, 5), (401, 6)))
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in zip(*columns, strict=True)]


def causal_model(folder: Path, *, dropout: float = 0.0) -> Any:
    """Loaded from a folder: the trainers load their reference model from where the policy came from."""
    llama(dropout=dropout).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def with_new_adapter(model: Any) -> dict[str, Any]:
    """The reference is the model with its adapter off."""
    # With the usual beginning, in which B is zero, the first steps would say nothing.
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return {"model": model, "peft_config": lora}


def with_trained_adapter(model: Any) -> dict[str, Any]:
    """The reference is, since TRL 1.0, the model with a copy of the adapter, which stays as it is."""
    torch.manual_seed(0)
    return {"model": get_peft_model(model, with_new_adapter(model)["peft_config"])}


def with_prompt(model: Any) -> dict[str, Any]:
    """The reference is the model without the virtual tokens in front of the real ones."""
    return {"model": model, "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}


ADAPTERS = (with_new_adapter, with_trained_adapter, pytest.param(with_prompt, marks=needs("trl", "1.8")))


def sft(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    data = [{"text": text} for text in texts(start=0, shortest=12)]
    return _trainer("SFT", folder, data, callbacks, model=model, max_length=48, **arguments)


def dpo(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    return _trainer("DPO", folder, pairs(), callbacks, model=model, **arguments)


def kto(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    data = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": i % 2 == 0} for i, pair in enumerate(pairs())
    ]
    return _trainer("KTO", folder, data, callbacks, model=model, **arguments)


def reward(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    config = model.config
    config.update({"num_labels": 1, "pad_token_id": 0})
    classifier = AutoModelForSequenceClassification.from_config(config)
    data = [{name: pair[name] for name in ("chosen", "rejected")} for pair in pairs()]
    return _trainer("Reward", folder, data, callbacks, model=classifier, **arguments)


def grpo(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    return _online("GRPO", folder, callbacks, model=model, **arguments)


def rloo(folder: Path, callbacks: list[Any], *, model: Any, **arguments: Any) -> Any:
    return _online("RLOO", folder, callbacks, model=model, **arguments)


def _online(name: str, folder: Path, callbacks: list[Any], **arguments: Any) -> Any:
    def number_of_letters(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    data = [{"prompt": text} for text in texts(start=0, shortest=8)]
    # With a beta there is a reference; old log-probabilities are those of more than one iteration.
    given = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2, "use_vllm": False}
    return _trainer(name, folder, data, callbacks, reward_funcs=number_of_letters, **{**given, **arguments})


def _trainer(
    name: str, folder: Path, data: list[dict[str, Any]], callbacks: list[Any], *, model: Any, **arguments: Any
) -> Any:
    """What only some trainers or some versions of TRL know is left out for the others."""
    config = getattr(trl, f"{name}Config")
    known = {field.name for field in dataclasses.fields(config)}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "disable_dropout": False,
        **arguments,
    }
    others = {key: settings.pop(key) for key in ("reward_funcs", "peft_config") if key in settings}
    optional = {"disable_dropout"} - known
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=config(str(folder), **{key: value for key, value in settings.items() if key not in optional}),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:EVALUATED]),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **others,
    )
