"""A pretrained model, SmolLM2-135M: its layers are read by their tokens, and not by one of them."""

from __future__ import annotations

import itertools
import warnings
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from examples.smollm2 import load
from matent_callbacks import CollapseDetector, EntropyMonitor

RANK = "effective_rank"


@pytest.fixture(scope="module")
def pretrained() -> tuple[Any, dict[str, torch.Tensor]]:
    model, tokenizer = load()
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)[:4]), add_special_tokens=False)["input_ids"]
    return model, {"input_ids": torch.tensor(ids[: 4 * 96]).view(4, 96)}


def measure(pretrained: tuple[Any, dict[str, torch.Tensor]], **arguments: Any) -> dict[str, float]:
    model, batch = pretrained
    monitor = EntropyMonitor(model, **{"layers": "all", "metrics": RANK, **arguments})
    monitor.read(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return monitor.compute()


@pytest.fixture(scope="module")
def with_sinks(pretrained: Any) -> dict[str, float]:
    return measure(pretrained, metrics=(RANK, "max_norm_ratio", "sink_tokens"), exclude_sinks=False)


@pytest.fixture(scope="module")
def without(pretrained: Any) -> dict[str, float]:
    return measure(pretrained)


def test_the_model_has_sinks_from_layer_12_to_29(with_sinks):
    for layer in range(12, 30):
        assert with_sinks[f"sink_tokens/layer_{layer:02d}"] == 1.0
    assert with_sinks["max_norm_ratio/layer_12"] > 100
    for layer in ("layer_00", "layer_01", "layer_10", "layer_11", "last"):
        assert with_sinks[f"sink_tokens/{layer}"] == 0.0
        assert with_sinks[f"max_norm_ratio/{layer}"] < 4


def test_without_them_the_middle_is_as_rich_as_its_neighbours(with_sinks, without):
    ranks = [without[f"{RANK}/layer_{layer:02d}"] for layer in range(11, 29)]
    assert with_sinks[f"{RANK}/layer_12"] < 5
    assert all(0.9 < after / before < 1.2 for before, after in itertools.pairwise(ranks))


def test_last_is_what_it_was_in_every_bit(with_sinks, without):
    for layer in ("layer_00", "layer_11", "last"):
        assert without[f"{RANK}/{layer}"] == with_sinks[f"{RANK}/{layer}"]


def test_the_first_reading_says_where_they_are(pretrained):
    model, batch = pretrained
    monitor = EntropyMonitor(model, layers=[11, 12, 13, 14, "last"], metrics=RANK)
    monitor.read(batch)
    with pytest.warns(UserWarning, match=r"left out of the numbers of layer_12 to layer_14: .* `exclude_sinks=False`"):
        monitor.compute()


def test_a_sink_that_is_born_is_no_collapse_and_a_collapse_is_one(pretrained):
    """The first token grows from the length of the others to that of the pretrained model."""
    model, batch = pretrained
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[12]
    length = states[:, 1:].norm(dim=-1).log().mean().exp()
    directions = torch.linalg.qr(torch.randn(states.shape[-1], 3)).Q
    flat = states @ directions @ directions.T
    found: dict[str, list[int]] = {"born": [], "born, counted": [], "collapse": []}
    detectors = {name: CollapseDetector(floor=0.25, patience=5) for name in found}
    for step in range(40):
        for name, detector in detectors.items():
            now = (flat if name == "collapse" and step >= 20 else states).clone()
            now[:, 0] *= length * 166 ** min(1.0, step / 20) / now[:, 0].norm(dim=-1, keepdim=True)
            if detector.update(step, rank_of(now, exclude_sinks=name != "born, counted")):
                found[name].append(step)
    assert found["born"] == []
    assert found["born, counted"]
    assert found["collapse"][0] >= 24


def rank_of(states: torch.Tensor, *, exclude_sinks: bool) -> float:
    monitor = EntropyMonitor(torch.nn.Sequential(torch.nn.Identity()), "0", metrics=RANK, exclude_sinks=exclude_sinks)
    with monitor:
        monitor.model(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return monitor.compute()[f"{RANK}/0"]
