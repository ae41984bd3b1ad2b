"""Loads models with ``AutoModel`` and their tokenizer, without running their code or pickles unless allowed."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from matent_callbacks.cli._adapters import ModelError, class_with_head, find_adapter, num_labels, with_adapter

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


class LayersError(ModelError):
    """A model that does not have the layers asked for."""


class Loaded(NamedTuple):
    """A model and what is known of it."""

    model: nn.Module
    tokenizer: Any
    max_length: int | None
    """The most tokens that it takes, if known."""
    notes: list[str]
    """What the user should know about it, in sentences."""


def load(
    name: str,
    *,
    dtype: str,
    device: str,
    device_map: str | None = None,
    baseline: str | None = None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Loaded:
    """Load a model in evaluation mode, on ``device``, or spread over several by accelerate's ``device_map``.

    The folder of a PEFT adapter is loaded as its base with the adapter on it. ``baseline`` is taken for the base where
    the one that the adapter names is not on this machine.

    Raises:
        ModelError: If it cannot be loaded, or only with what is not allowed.
    """
    import transformers

    adapter = find_adapter(name, baseline=baseline)
    base = adapter.base if adapter else name
    for folder in dict.fromkeys((base, name)):
        _check_weights(folder, allow_pickle=allow_pickle)
    common = {"trust_remote_code": trust_remote_code}
    with _silent():
        try:
            config = transformers.AutoConfig.from_pretrained(base, **common, **(num_labels(name) if adapter else {}))
            _check_kernels(base, config, trust_remote_code=trust_remote_code)
            tokenizer = _tokenizer(name if adapter and adapter.has_tokenizer else base, common)
            kind = class_with_head(adapter, config) if adapter else transformers.AutoModel
            model, info = kind.from_pretrained(
                base,
                config=config,
                dtype=DTYPES.get(dtype, "auto"),
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                device_map=device_map,
                # With "main", older releases request a conversion of a hub repository without .safetensors.
                revision=getattr(config, "_commit_hash", None) or "main",
                **common,
            )
            # The head that an adapter may need is not measured: this is the prefix of all else.
            prefix = f"{model.base_model_prefix}." if adapter and hasattr(model, model.base_model_prefix) else ""
            own = [key for key in model.state_dict() if key.startswith(prefix) and "pooler" not in key]
            missing = sorted(set(own) & set(info["missing_keys"]))
            if missing and len(missing) >= len(own):
                raise ModelError(
                    f"{base} has no weight of {type(model).__name__}, so there is nothing trained to measure."
                )
            if adapter:
                model = with_adapter(model, name, tokenizer)
        except ModelError:
            raise
        except Exception as error:
            of = f"{name} is an adapter, whose base may be given as --baseline. " if adapter else ""
            raise ModelError(of + _why(base, error, trust_remote_code=trust_remote_code)) from error
    notes = [adapter.note] if adapter and adapter.note else []
    if missing:
        notes.append(f"{base} lacks {len(missing)} weights ({missing[0]}, ...), which are random here.")
    # Positions are counted from the left, so padding goes to the right, whatever the tokenizer is set to.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    model = model if device_map else model.to(device)
    return Loaded(model.eval(), tokenizer, _max_length(model, tokenizer), notes)


def runnable(model: Any) -> Any:
    """Return what text is run through: the encoder of an encoder-decoder, as in the paper's ``AutoModel(...)[0]``."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def training_progress(name: str) -> dict[str, int | None]:
    """Read steps and tokens of the run that a local model comes from: its ``trainer_state.json`` is in or beside it."""
    folder = Path(name)
    for file in (folder / "trainer_state.json", folder.resolve().parent / "trainer_state.json"):
        try:
            state = json.loads(file.read_text(encoding="utf-8")) if folder.is_dir() else {}
            # The Trainer writes 0 tokens where it was not told to count them.
            return {"steps": state.get("global_step"), "tokens": state.get("num_input_tokens_seen") or None}
        except (OSError, ValueError, AttributeError):
            continue
    return {"steps": None, "tokens": None}


def _tokenizer(name: str, common: dict[str, Any]) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **common)
    except TypeError:  # before 5.0, of the path of a tokenizer file that does not exist
        tokenizer = None
    # Where there is no tokenizer, transformers creates one with an empty vocabulary.
    if tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"{name} has no tokenizer, or an empty one: save it with `tokenizer.save_pretrained`.")
    return tokenizer


def _check_weights(name: str, *, allow_pickle: bool) -> None:
    folder = Path(name)
    if not folder.is_dir():
        return
    safe, *pickled = (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)
    unsafe = [file for files in pickled for file in files]
    if not safe and not unsafe:
        raise ModelError(f"{name} has no weights: there is no .safetensors file in it.")
    if not allow_pickle and not safe:
        raise ModelError(
            f"{name} has its weights pickled ({unsafe[0].name}), and a pickle can run code when it is loaded: "
            "save them as .safetensors, or pass --allow-pickle if you trust whoever made it."
        )


def _check_kernels(name: str, config: Any, *, trust_remote_code: bool) -> None:
    """Raise if a config asks for kernels from a hub repository, which are code as well, without being trusted."""
    asked = [value for key, value in _items(config.to_dict()) if key.lstrip("_").endswith("_implementation")]
    asked += [getattr(config, key, None) for key in ("_attn_implementation", "_experts_implementation")]
    remote = [value for value in asked if isinstance(value, str) and "/" in value]
    if remote and not trust_remote_code:
        raise ModelError(f"{name} wants to run code of {remote[0]}: pass --trust-remote-code if you trust its author.")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield str(key), item
        yield from _items(item)


def _why(name: str, error: Exception, *, trust_remote_code: bool) -> str:
    text = str(error)
    if "trust_remote_code" in text and not trust_remote_code:
        return f"{name} needs code of its own to run: pass --trust-remote-code if you trust whoever made it."
    if "use_safetensors" in text:
        return f"{name} has no .safetensors file: pass --allow-pickle if you trust whoever made its pickled weights."
    return f"{name} cannot be loaded: {first_sentence(error)}"


def first_sentence(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _max_length(model: Any, tokenizer: Any) -> int | None:
    bounds = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and similar models start counting positions after the index of the padding token.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            bounds.append(module.num_embeddings - module.padding_idx - 1)
    known = [int(bound) for bound in bounds if isinstance(bound, int) and 0 < bound < 2**31]
    return min(known, default=None)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress what loading prints: all that matters is said in one sentence elsewhere."""
    import transformers

    # Otherwise transformers requests a conversion of a hub repository without .safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
