"""Small models of one's own, which remember the hidden states that are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.conftest import slow_pooled_entropy

WIDTH, VOCABULARY = 16, 50
IDS = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList(FeedForward() for _ in range(4)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Block(nn.Module):
    def __init__(self, feed_forward: Callable[[], nn.Module] = FeedForward) -> None:
        super().__init__()
        self.a, self.f = Attention(), feed_forward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.f(x)


def two_feed_forwards() -> nn.Module:
    return nn.Sequential(FeedForward(), FeedForward())


class Own(nn.Module):
    """Remembers the hidden states that are right."""

    states: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.states = []


def scaled(model: nn.Module) -> Any:
    """With norms that are not the identity on what is normalised already."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
    return model


def check(model: Any, *inputs: Tensor, layers: Any = "all", module: str | None = None, states: Any = None) -> None:
    """Read a model, twice: the first time finds out, the second knows."""
    model = scaled(model).double()
    monitor = EntropyMonitor(model, layers, metrics="matrix_entropy", module=module, dtype=torch.float64)
    for grad in (True, False, True):
        with monitor, torch.set_grad_enabled(grad):
            model(*(inputs or (IDS,)))
        readings = {key.removeprefix("matrix_entropy/"): value for key, value in monitor.compute().items()}
        right = states(model) if states else model.states
        keys = [*(f"layer_{index:02d}" for index in range(len(right) - 1)), "last"]
        if layers != "all":
            keys, right = ["last"], right[-1:]
        assert list(readings) == keys
        for key, hidden in zip(keys, right, strict=True):
            assert readings[key] == pytest.approx(slow_pooled_entropy(hidden.detach()), abs=1e-9), key


class GPT(Own):
    def __init__(self, blocks: Any = 3, names: tuple[str, ...] = ("emb", "blocks", "norm")) -> None:
        super().__init__()
        for name in names:
            if name == "emb":
                self.emb = nn.Embedding(VOCABULARY, WIDTH)
            elif name == "blocks":
                self.blocks = nn.ModuleList(Block() for _ in range(blocks)) if isinstance(blocks, int) else blocks
            else:
                self.add_module(name.removesuffix("*"), nn.LayerNorm(WIDTH))
        # The final norm is marked, or is the last of those that embeddings do not have.
        self.final = next((n.removesuffix("*") for n in names if n.endswith("*")), "norm" if "norm" in names else "")
        self.of_embeddings = [n for n in names if n not in ("emb", "blocks", self.final) and not n.endswith("*")]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for name in self.of_embeddings:
            x = self.get_submodule(name)(x)
        self.states = [x]
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            self.states.append(block(self.states[-1]))
        if self.final:
            self.states[-1] = self.get_submodule(self.final)(self.end(self.states[-1]))
        return self.states[-1]

    def end(self, x: Tensor) -> Tensor:
        return x


class Outer(Own):
    """A final norm around torch's encoder."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.emb, self.batch_first = nn.Embedding(VOCABULARY, WIDTH), batch_first
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, norm_first=True, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        self.states = [x]
        for layer in self.encoder.layers:
            self.states.append(self.turn(nn.TransformerEncoderLayer.forward(layer, self.turn(self.states[-1]))))
        self.states[-1] = self.turn(self.ln_f(self.encoder(self.turn(x))))
        return self.states[-1]

    def turn(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)


class Encoder(Own):
    """Torch's encoder, with the embeddings around it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        self.states = [self.encoder(self.emb(ids))]
        return self.states[0]
