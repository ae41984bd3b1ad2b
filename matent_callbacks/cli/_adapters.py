"""Loads PEFT adapters: finds the base of an adapter, and puts the adapter on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class ModelError(ValueError):
    """A model that cannot be measured; the message is one sentence."""


class Adapter(NamedTuple):
    """What the config of an adapter says."""

    base: str
    """Folder of the base, or its name on the hub."""
    has_tokenizer: bool
    config: Any
    note: str | None
    """What the user should know about the base, one sentence."""


def is_path(name: str) -> bool:
    """Whether the name of a model is that of a folder, rather than one on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def find_adapter(name: str, *, baseline: str | None) -> Adapter | None:
    """Read the config of an adapter; ``None`` if the folder is not that of an adapter.

    The base is the one that the config names, or the ``baseline`` where that is not on this machine.

    Raises:
        ModelError: If it is of a kind that cannot be measured, or its base is not known.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file():
        return None
    try:
        from peft import PeftConfig
    except ModuleNotFoundError as error:
        raise ModelError(f"{name} is an adapter, and needs {error.name}: pip install peft") from error
    try:
        config = PeftConfig.from_pretrained(name)
    except Exception as error:
        raise ModelError(f"{name} has an adapter_config.json that peft cannot read.") from error
    if config.is_prompt_learning:
        raise ModelError(
            f"{name} is an adapter of virtual tokens ({config.peft_type.value}), which are not part of the documents: "
            "only adapters of weights, such as LoRA, can be measured."
        )
    named, note = config.base_model_name_or_path, None
    base = named
    if not (named and _is_here(named)) and baseline and not (Path(baseline) / "adapter_config.json").is_file():
        base = baseline
        if named != baseline:
            note = f"{name} is put on the baseline {baseline}: its own base {named or ''} is not on this machine."
    elif not named or (is_path(named) and not _is_here(named)):
        missing = f"of {named}, which is not there" if named else "that does not name its base"
        raise ModelError(f"{name} is an adapter {missing}: give the folder of its base as --baseline.")
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return Adapter(base, has_tokenizer, config, note)


def class_with_head(adapter: Adapter, base_config: Any) -> Any:
    """Return the class that the base was loaded with for training, since the adapter's names of modules are of that."""
    import transformers

    mapped = (adapter.config.auto_mapping or {}).get("base_model_class")
    head = _HEADS.get(adapter.config.task_type)
    names = [head] if head else [mapped, *(base_config.architectures or [])]
    found = [getattr(transformers, name) for name in names if name and hasattr(transformers, name)]
    return next(iter(found), transformers.AutoModel)


def num_labels(name: str) -> dict[str, int]:
    """Return how many classes the head has that is saved with an adapter, as an argument of its class."""
    from safetensors import safe_open

    file = Path(name) / "adapter_model.safetensors"
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as weights:
        of_heads = [key for key in weights.keys() if _is_head(key.split("."))]  # noqa: SIM118 - it is no mapping
        return {"num_labels": weights.get_slice(of_heads[-1]).get_shape()[0]} if of_heads else {}


def with_adapter(base: Any, name: str, tokenizer: Any) -> Any:
    """Put an adapter on a model, and return the model without its head.

    Raises:
        ModelError: If it does not fit.
    """
    from peft import PeftModel

    rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:  # as `AutoPeftModel` does, for tokens that were added for the training
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    try:
        # Without autocast its weights have the dtype of those that they change.
        model = PeftModel.from_pretrained(base, name, autocast_adapter_dtype=False)
        # Once more, since only this tells which weights found no place.
        loaded = model.load_adapter(name, "default", autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{name} does not fit its base: {_first(str(error).splitlines())}") from error
    if stray := [*loaded.unexpected_keys, *loaded.missing_keys]:
        raise ModelError(f"{name} does not fit its base: there is no place, or no weight, for {stray[0]}.")
    whole: Any = model.get_base_model()
    inner = whole.base_model
    if hasattr(whole, "hf_device_map"):
        inner.hf_device_map = whole.hf_device_map
    return inner


def _is_here(name: str) -> bool:
    if is_path(name):
        return Path(name).is_dir()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _is_head(parts: list[str]) -> bool:
    return parts[-1] == "weight" and any(part in ("score", "classifier") for part in parts)


def _first(lines: Iterable[str]) -> str:
    # The first line of torch's message names the class only.
    found = [line.strip() for line in lines if line.strip()]
    return (found[1] if len(found) > 1 else found[0])[:300]
