"""Sinks are left out of a layer's readings: simulated in a small model, and in a pretrained one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.functional import sink_tokens
from tests.conftest import llama, text_examples
from tests.versions import needs

LENGTH = 100.0
METRICS = ("effective_rank", "sequence_matrix_entropy", "rankme", "token_norm", "curvature", "embedding_rankme")


@contextmanager
def a_sink(model: nn.Module, place: int | Tensor = 0) -> Iterator[None]:
    """The token at a place of each sequence is longer by far in the middle of the model."""

    def longer(module: nn.Module, inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[..., place, :] *= LENGTH
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = model.model.layers[0].register_forward_hook(longer)
    try:
        yield
    finally:
        handle.remove()


def ids(count: int = 4, length: int = 24) -> Tensor:
    return torch.tensor([e["input_ids"] for e in text_examples(3 * count, length) if len(e["input_ids"]) == length])[
        :count
    ]


def measure(
    model: nn.Module, inputs: dict[str, Tensor], mask: Tensor | None = None, **arguments: Any
) -> dict[str, float]:
    monitor = EntropyMonitor(model, layers="all", **{"metrics": METRICS, **arguments})
    monitor.read(inputs, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return monitor.compute()


def test_a_layer_with_a_sink_is_read_without_it():
    model, inputs = llama(dropout=0.0).eval(), {"input_ids": ids()}
    without_first = torch.ones(4, 24)
    without_first[:, 0] = 0
    with a_sink(model):
        found = measure(model, inputs)
        expected = measure(model, inputs, without_first, exclude_sinks=False)
        everything = measure(model, inputs, exclude_sinks=False)
    for key in found:
        middle = key.endswith(("layer_01", "layer_02"))
        # A token fewer in the sums: others round otherwise.
        assert found[key] == pytest.approx((expected if middle else everything)[key], rel=1e-4), key
    assert found["effective_rank/layer_01"] > 2 * everything["effective_rank/layer_01"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_sink_nothing_changes_in_any_bit(dtype):
    model, inputs = llama(dropout=0.0).eval().to(dtype), {"input_ids": ids()}
    metrics = tuple(CATALOGUE)
    assert measure(model, inputs, metrics=metrics) == measure(model, inputs, metrics=metrics, exclude_sinks=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_in_half_precision(dtype):
    model, inputs = llama(dropout=0.0).eval().to(dtype), {"input_ids": ids()}
    with a_sink(model):
        found = measure(model, inputs, metrics=("sink_tokens", "max_norm_ratio"))
    assert [found[f"sink_tokens/{layer}"] for layer in ("layer_00", "layer_01", "layer_02", "last")] == [0, 1, 1, 0]
    assert found["max_norm_ratio/layer_01"] > 50
    assert found["max_norm_ratio/last"] < 4


def test_padding_neither_counts_nor_hides_a_sink():
    model, mask = llama(dropout=0.0).eval(), torch.ones(4, 24)
    mask[:2, :12] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    # The first token that counts is the sink, and the padding before it is as long.
    places = torch.arange(13)
    with a_sink(model, places):
        found = measure(model, inputs, metrics=("sink_tokens", "effective_rank"))
        mask[:2, 12] = 0
        expected = measure(model, {**inputs, "attention_mask": mask}, metrics=("effective_rank",), exclude_sinks=False)
    # In the other two sequences 13 of 24 are long: these are no sinks.
    assert found["sink_tokens/layer_01"] == 0.5
    assert expected["effective_rank/layer_01"] > 1


def test_each_document_of_a_packed_row_has_its_own_sinks():
    model, rows = llama(dropout=0.0).eval(), ids(4)
    packed = {"input_ids": rows.reshape(1, -1), "position_ids": torch.arange(24).repeat(4).unsqueeze(0)}
    with a_sink(model, torch.tensor([0, 24, 48])):
        found = measure(model, packed, metrics=("sink_tokens", "effective_rank"))
    assert found["sink_tokens/layer_01"] == 0.75
    with a_sink(model):
        alone = measure(model, {"input_ids": rows}, metrics=("effective_rank",))
    assert found["effective_rank/layer_01"] == pytest.approx(alone["effective_rank/layer_01"], rel=0.2)


def test_many_long_tokens_are_no_sinks():
    model, inputs = llama(dropout=0.0).eval(), {"input_ids": ids()}
    with a_sink(model, torch.arange(7)):
        found = measure(model, inputs, metrics=("sink_tokens", "effective_rank"))
        everything = measure(model, inputs, metrics=("sink_tokens", "effective_rank"), exclude_sinks=False)
    assert found == everything
    assert found["sink_tokens/layer_01"] == 0


def test_max_tokens_counts_what_is_left():
    model, inputs = llama(dropout=0.0).eval(), {"input_ids": ids()}
    mask = torch.ones(4, 24)
    mask[:, 0] = 0
    with a_sink(model):
        found = measure(model, inputs, metrics="effective_rank", max_tokens=30)
        expected = measure(model, inputs, mask, metrics="effective_rank", max_tokens=30, exclude_sinks=False)
    assert found["effective_rank/layer_01"] == pytest.approx(expected["effective_rank/layer_01"], rel=1e-4)


def test_one_warning_says_which_layers_have_sinks_and_how_long_they_are():
    model, inputs = llama(layers=5, dropout=0.0).eval(), {"input_ids": ids()}
    monitor = EntropyMonitor(model, layers="all")
    with a_sink(model):
        monitor.read(inputs)
        with pytest.warns(
            UserWarning, match=r"Attention sinks.* left out of the numbers of layer_01 to layer_04"
        ) as told:
            monitor.compute()
        assert len(told) == 1
        least, most = map(float, re.search(r"that are (\d+) to (\d+) times", str(told[0].message)).groups())
        assert 20 < least <= most < 200
        monitor.read(inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monitor.compute()


# Before, what a model outputs is recorded ahead of the hook that makes the sink.
@needs("transformers", "5.0")
def test_what_is_left_out_are_the_sinks_of_the_definition():
    model, inputs = llama(dropout=0.0).eval(), {"input_ids": ids()}
    with a_sink(model):
        states = model(**inputs, output_hidden_states=True).hidden_states
        found = measure(model, inputs, metrics="sink_tokens")
    for number, layer in enumerate(("layer_00", "layer_01", "layer_02", "last")):
        assert found[f"sink_tokens/{layer}"] == sink_tokens(states[number]).sum() / 4


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_a_vector_of_a_sequence_is_no_sink(max_tokens):
    """Layers that output one vector per sequence, such as poolers: ``(B, d)``."""
    pooler = nn.Identity()
    vectors = torch.randn(20, 8)
    vectors[3] *= LENGTH
    found = {}
    for exclude in (True, False):
        monitor = EntropyMonitor(
            nn.Sequential(pooler), "0", metrics="embedding_rankme", exclude_sinks=exclude, max_tokens=max_tokens
        )
        with monitor:
            monitor.model(vectors)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[exclude] = monitor.compute()
        assert not any("sinks" in str(warning.message) for warning in caught)
    assert found[True] == found[False]
