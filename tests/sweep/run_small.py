"""Runs a small model of any class, and compares what is read with the hidden states that it returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from matent_callbacks import EntropyMonitor
from matent_callbacks.capture.stack import find_stack
from tests.conftest import slow_pooled_entropy


def make_inputs(model: Any, name: str) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs that a model of any class may take, and the mask of their tokens."""
    torch.manual_seed(1)
    config, taken = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inputs: dict[str, Any] = {}
    mask = None
    if "input_ids" in taken:
        shape = (2, 2, 12) if "ForMultipleChoice" in name else (4, 12)
        inputs["input_ids"] = torch.randint(5, min(getattr(text, "vocab_size", 0) or 90, 90), shape)
        if "attention_mask" in taken:
            mask = torch.ones(shape, dtype=torch.long)
            mask[0, ..., 9:] = 0
            inputs["input_ids"][mask == 0] = getattr(text, "pad_token_id", None) or 0
            inputs["attention_mask"] = mask
            mask = mask.view(-1, 12)
        is_decoded = getattr(config, "is_encoder_decoder", False) and "ForSequenceClassification" not in name
        if is_decoded and "decoder_input_ids" in taken:
            inputs["decoder_input_ids"] = torch.randint(5, 90, (4, 6))
    elif "pixel_values" in taken:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32) or 32
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.randn(3, getattr(vision, "num_channels", 3) or 3, high, wide)
    elif "input_values" in taken:
        inputs["input_values"] = torch.randn(3, 1600)
    elif "input_features" in taken:
        # Audio comes as bins x frames or the other way round; models that know a number of bins say which by it.
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 16)
        inputs["input_features"] = torch.randn(3, bins, 32)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.randint(5, 90, (3, 6))
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return inputs, mask


def own_states(model: Any, output: Any) -> tuple[Tensor, ...] | None:
    for name in ("encoder_hidden_states", "hidden_states"):
        states = getattr(output, name, None)
        if states is not None and len(states) and all(isinstance(state, Tensor) for state in states):
            return tuple(states)
    return None


def compare(model: Any, name: str) -> str:
    """Run a model: "same", or how its own hidden states differ from what is read.

    Raises:
        Exception: What the model failed with.
    """
    model = model.eval().float()
    inputs, mask = make_inputs(model, name)
    find_stack(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that begin as zeros would make layers alike.
            parameter.add_(0.1 * torch.randn_like(parameter))
    monitor = EntropyMonitor(
        model, "all", metrics="matrix_entropy", dtype=torch.float64, on_error="raise", exclude_sinks=False
    )
    with torch.no_grad(), monitor:
        torch.manual_seed(3)
        output = model(**inputs, output_hidden_states=True)
    readings = list(monitor.compute().values())
    states = own_states(model, output)
    if states is None:
        return "no hidden states"
    if any(state.ndim != 3 for state in states):
        return "no tokens"
    if any(state.shape[1] != states[0].shape[1] or mask is None or state.shape[:2] != mask.shape for state in states):
        mask = None
    theirs = [slow_pooled_entropy(state, mask) for state in states]
    same = [any(abs(ours - value) < 1e-4 for value in theirs) for ours in readings]
    if len(readings) == len(theirs) and all(abs(a - b) < 1e-4 for a, b in zip(readings, theirs, strict=True)):
        return "same"
    found = "".join("=" if is_same else "x" for is_same in same)
    last = getattr(output, "last_hidden_state", None)
    is_last = isinstance(last, Tensor) and abs(slow_pooled_entropy(last, mask) - readings[-1]) < 1e-4
    return f"{len(readings)} read, {len(theirs)} returned, {found}{' last' if is_last else ''}"
