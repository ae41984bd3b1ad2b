"""torch's own transformer modules: padding masks, layouts, and the fast path that they take in evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.conftest import slow_pooled_entropy

WIDTH, BATCH, LENGTH = 16, 3, 7
LENGTHS = torch.tensor([7, 4, 5])


def valid(length: int = LENGTH) -> Tensor:
    return torch.arange(length) < LENGTHS.unsqueeze(1)


def padding(kind: str, length: int = LENGTH) -> Tensor:
    hidden = ~valid(length)
    if kind == "bool":
        return hidden
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))


def encoder(*, batch_first: bool, norm_first: bool = False, norm: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    # Nested tensors are for layers that normalise last.
    last = nn.LayerNorm(WIDTH, dtype=torch.float64) if norm else None
    return nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=not norm_first)


def in_layout(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def reading(monitor: EntropyMonitor) -> dict[str, float]:
    return {key.split("/")[1]: value for key, value in monitor.compute().items() if key.startswith("matrix_entropy")}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "fast path"])
@pytest.mark.parametrize("length", [LENGTH, BATCH])  # as long as the batch is large: nothing is told by the shape
def test_key_padding_masks_of_an_encoder(batch_first, kind, mode, length):
    model = encoder(batch_first=batch_first, norm=True).train(mode == "training")
    x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
    lengths = LENGTHS.clamp(max=length)
    lengths[1] -= 1
    tokens = torch.arange(length) < lengths.unsqueeze(1)
    mask = ~tokens if kind == "bool" else torch.zeros(tokens.shape).double().masked_fill(~tokens, float("-inf"))
    # The definition, layer by layer and without the fast path: it attends in the same way.
    states = [x]
    for layer in model.layers:
        states.append(in_layout(layer(in_layout(states[-1], batch_first), src_key_padding_mask=mask), batch_first))
    states.append(model.norm(states[-1]))

    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    with monitor, torch.set_grad_enabled(mode != "fast path"):
        model(in_layout(x, batch_first), src_key_padding_mask=mask)
    readings = reading(monitor)
    for key, hidden in zip(("layer_00", "layer_01", "last"), (states[0], states[1], states[3]), strict=True):
        expected = slow_pooled_entropy(hidden.detach(), tokens)
        assert readings[key] == pytest.approx(expected, abs=1e-9), key


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_by_name(batch_first):
    model = encoder(batch_first=batch_first)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    names = ["layers.0.self_attn", "layers.0.linear1", "layers.1.norm2", "layers.1"]
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update(
                {name: (output[0] if isinstance(output, tuple) else output).detach()}
            )
        )
    monitor = EntropyMonitor(model, names, dtype=torch.float64)
    with monitor:
        model(in_layout(x, batch_first), src_key_padding_mask=padding("bool"))
    readings = reading(monitor)
    for name in names:
        expected = slow_pooled_entropy(in_layout(seen[name], batch_first), valid())
        assert readings[name] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layers", ["all", "layers.0", "layers.1.linear2"])
def test_the_fast_path_is_left_as_it_is(norm_first, layers):
    """A hook inside a layer would switch it off, and with it the last digits of what evaluation gives."""
    model = encoder(batch_first=True, norm_first=norm_first).float().eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        alone = [model(x, src_key_padding_mask=mask) for mask in (padding("bool"), None)]
        monitor = EntropyMonitor(model, layers)
        with monitor:
            watched = [model(x, src_key_padding_mask=mask) for mask in (padding("bool"), None)]
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    if layers != "layers.1.linear2":
        assert reading(monitor)
        return
    with pytest.warns(
        UserWarning, match=r"No forward of layers.1.linear2 ran, .* fused kernel .*: last, all, layers.1\."
    ):
        assert all(math.isnan(value) for value in reading(monitor).values())
    # A probe is a forward of our own.
    with torch.no_grad():
        monitor.read(x)
    assert reading(monitor)


def test_a_decoder_has_its_own_mask():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerDecoder(layer, 2)
    x, memory = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)
    of_memory = padding("bool").flip(0)
    masks = {"tgt_key_padding_mask": padding("bool"), "memory_key_padding_mask": of_memory}
    seen: list[Tensor] = []
    model.layers[0].multihead_attn.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    names = ["last", "layers.0.multihead_attn"]
    monitor = EntropyMonitor(model, names, dtype=torch.float64)
    with monitor:
        last = model(x, memory, **masks)
    readings = reading(monitor)
    assert readings["last"] == pytest.approx(slow_pooled_entropy(last.detach(), valid()), abs=1e-9)
    assert readings[names[1]] == pytest.approx(slow_pooled_entropy(seen[0], valid()), abs=1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_and_decoder_of_one_model(batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 2, 2, 32, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    source, target = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)
    arguments = [in_layout(source, batch_first), in_layout(target, batch_first)]
    of_source = {"src_key_padding_mask": padding("bool"), "memory_key_padding_mask": padding("bool")}
    of_target = {"tgt_key_padding_mask": padding("bool").flip(0)}
    memory = in_layout(model.encoder(arguments[0], src_key_padding_mask=padding("bool")), batch_first).detach()
    for masks, tokens in [({**of_source, **of_target}, valid().flip(0)), (of_source, None)]:
        for module, mask in [(None, valid()), ("decoder", tokens)]:
            monitor = EntropyMonitor(model, module=module, dtype=torch.float64)
            with monitor:
                last = in_layout(model(*arguments, **masks), batch_first)
            hidden = last.detach() if module else memory
            assert reading(monitor)["last"] == pytest.approx(slow_pooled_entropy(hidden, mask), abs=1e-9)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor) -> Any:
        return self.attention(x, other, other, key_padding_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_the_mask_of_the_keys_is_that_of_the_queries_only_in_self_attention(kind):
    torch.manual_seed(0)
    model = Attends()
    x, other = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)
    for keys, tokens in [(x, valid()), (other, None)]:
        monitor = EntropyMonitor(model, "attention", dtype=torch.float64)
        with monitor:
            output, _ = model(x, keys, padding(kind))
        assert reading(monitor)["attention"] == pytest.approx(slow_pooled_entropy(output.detach(), tokens), abs=1e-9)
