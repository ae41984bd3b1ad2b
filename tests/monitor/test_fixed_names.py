"""The names of a monitor's numbers stay the same; what is not defined is NaN, and told once with the reason."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.catalogue import CATALOGUE

WIDTH = 8


def monitored(monitor: EntropyMonitor, states: torch.Tensor) -> tuple[dict[str, float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.read(states)
        values = monitor.compute()
    return values, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("metric", CATALOGUE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_each_metric_is_nan_without_a_finite_token(metric, bad):
    monitor = EntropyMonitor(nn.Sequential(nn.Identity()), "0", metrics=metric)
    states = torch.randn(4, 10, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = monitored(monitor, states)[0]
    spoilt, told = monitored(monitor, torch.full_like(states, bad))
    assert spoilt.pop("nonfinite_tokens/0") > 0
    assert list(spoilt) == list(expected)
    assert all(map(math.isnan, spoilt.values()))
    (message,) = told
    assert f"no reading of: 0. Of those seen, all {40} tokens are NaN or Inf in 0." in message
    assert monitored(monitor, torch.full_like(states, bad))[1] == []  # once
    assert monitored(monitor, states)[0] == expected


@pytest.mark.parametrize("embedding", ["last", "first"])
def test_some_tokens_with_nan_are_not_called_all(embedding):
    monitor = EntropyMonitor(nn.Sequential(nn.Identity()), "0", metrics="embedding_rankme", embedding=embedding)
    states = torch.randn(3, 5, WIDTH)
    states[:, [0, -1]] = math.nan
    values, (message,) = monitored(monitor, states)
    assert math.isnan(values["embedding_rankme/0"])
    assert "at least 1 sequence, and 0 came (embedding_rankme); 3 tokens were left out since they are NaN" in message


@pytest.mark.parametrize(
    ("metric", "shape", "needs"),
    [
        ("embedding_effective_rank", (1, 5), "at least 2 sequences, and 1 came"),
        ("curvature", (3, 2), "at least 1 sequence of 3 tokens or more, and 0 came"),
        ("sequence_matrix_entropy", (3, 1), "at least 1 sequence of 2 tokens or more, and 0 came"),
        ("lidar", (3, 7), "at least 2 sequences of 8 tokens or more, and 0 came"),
        ("holevo_information", (3, 1), "at least 1 sequence of 2 tokens or more, and 0 came"),
    ],
)
def test_what_a_metric_needs_is_told_once_though_another_has_a_value(metric, shape, needs):
    monitor = EntropyMonitor(nn.Sequential(nn.Identity()), "0", metrics=("token_norm", metric))
    states = torch.randn(*shape, WIDTH)
    values, (message,) = monitored(monitor, states)
    assert not math.isnan(values["token_norm/0"])
    assert math.isnan(values[f"{metric}/0"])
    assert f"so there is no {metric} of: 0. It takes {needs} ({metric}). " in message
    assert "`window_steps=`" in message
    assert monitored(monitor, states) == (pytest.approx(values, nan_ok=True), [])


def test_a_layer_that_fails_later_keeps_its_names_and_one_that_always_fails_has_none():
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    model[2].register_forward_hook(lambda module, inputs, output: None if model.training else output.sum())
    monitor = EntropyMonitor(model, "*", metrics=("matrix_entropy", "spectrum"), on_error="warn")
    states = torch.randn(2, 6, WIDTH)
    with monitor:
        model(states)
    first = monitor.compute()
    assert "spectrum_top_4/2" in first
    with monitor, pytest.warns(UserWarning, match="Reading layer '2' failed"):
        model.eval()(states)
    second = monitor.compute()
    assert list(second) == list(first)
    assert {key for key, value in second.items() if math.isnan(value)} == {key for key in first if key.endswith("/2")}
    with pytest.warns(UserWarning, match="No forward of Sequential was watched"):
        assert list(monitor.compute()) == list(first)
    always = EntropyMonitor(model, "*", on_error="warn")
    with always, pytest.warns(UserWarning, match="Reading layer '2' failed"):
        model(states)
    assert {key.partition("/")[2] for key in always.compute()} == {"0", "1"}
