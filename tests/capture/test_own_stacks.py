"""Which modules of a model of one's own are its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.capture.own_models import (
    GPT,
    VOCABULARY,
    WIDTH,
    Attention,
    Block,
    Experts,
    FeedForward,
    Own,
    check,
    two_feed_forwards,
)


@pytest.mark.parametrize("inside", [FeedForward, Experts, two_feed_forwards])
@pytest.mark.parametrize(
    "container",
    [
        lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
        lambda blocks: nn.ModuleDict({f"layer_{i}": block for i, block in enumerate(blocks)}),
        lambda blocks: nn.ModuleDict(dict(zip("abc", blocks, strict=True))),
        nn.ModuleList,
        lambda blocks: nn.Sequential(*blocks),
    ],
)
def test_containers_of_blocks(container, inside):
    torch.manual_seed(0)
    check(GPT(container([Block(inside) for _ in range(3)])))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("many", [2, 5])
@pytest.mark.parametrize("head", [Perceptron, lambda: nn.Sequential(Perceptron())])
@pytest.mark.parametrize("container", [nn.ModuleList, lambda heads: nn.ModuleDict({f"t{i}": h for i, h in heads})])
def test_heads_are_no_blocks(head, container, many):
    torch.manual_seed(0)

    class MultiTask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            heads = [head() for _ in range(many)]
            self.heads = container(heads if container is nn.ModuleList else enumerate(heads))
            self.backbone = GPT()

        def forward(self, ids: Tensor) -> list[Tensor]:
            h = self.backbone(ids)
            return [each(h) for each in (self.heads.values() if isinstance(self.heads, nn.ModuleDict) else self.heads)]

    check(MultiTask(), states=lambda model: model.backbone.states)


class Pairs(Own):
    """Blocks whose parts are in lists, as in many models that are published as code alone."""

    def __init__(self, part: Callable[[nn.Module], nn.Module], is_dict: bool, norm: str | None) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        if norm == "before":
            self.norm = nn.LayerNorm(WIDTH)
        pairs = [[part(Attention()), part(FeedForward())] for _ in range(3)]
        make = (lambda pair: nn.ModuleDict({"attn": pair[0], "ff": pair[1]})) if is_dict else nn.ModuleList
        self.layers = nn.ModuleList([make(pair) for pair in pairs])
        if norm == "after":
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for pair in self.layers:
            for part in pair.values() if isinstance(pair, nn.ModuleDict) else pair:
                x = part(x) + x
        self.states = [self.norm(x)]
        return self.states[-1]


@pytest.mark.parametrize("is_dict", [True, False])
@pytest.mark.parametrize("part", [lambda module: module, lambda module: nn.Sequential(nn.LayerNorm(WIDTH), module)])
def test_blocks_in_parts_have_a_last_state_where_a_norm_follows(part, is_dict):
    torch.manual_seed(0)
    for norm in ("before", "after"):
        check(Pairs(part, is_dict, norm), layers="last")
        with pytest.raises(
            ValueError, match=r"each item of 'layers' is a list of the parts of a block .*'layers.\*.0'"
        ):
            EntropyMonitor(Pairs(part, is_dict, norm), "all")
    with pytest.raises(ValueError, match="a list of the parts of a block"):
        EntropyMonitor(Pairs(part, is_dict, None))


def test_a_list_of_stages_is_one_of_blocks():
    torch.manual_seed(0)

    class Staged(GPT):
        def forward(self, ids: Tensor) -> Tensor:
            self.states = [self.emb(ids)]
            for stage in self.blocks:
                for block in stage:
                    self.states.append(block(self.states[-1]))
            self.states[-1] = self.norm(self.states[-1])
            return self.states[-1]

    check(Staged(nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))))


class Two(nn.Module):
    def __init__(self, first: str, second: str, depths: tuple[int, int] = (3, 5)) -> None:
        super().__init__()
        self.add_module(first, GPT(depths[0]))
        self.add_module(second, GPT(depths[1]))

    def forward(self, ids: Tensor) -> Any:
        return [child(ids) for child in self.children()]


@pytest.mark.parametrize("depths", [(3, 5), (5, 3), (3, 3)])
@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("encoder", "decoder"), 0),
        (("dec", "enc"), 1),
        (("text_encoder", "text_decoder"), 0),
        (("vision", "language_model"), 1),
    ],
)
def test_of_two_transformers_the_one_that_is_meant(names, meant, depths):
    torch.manual_seed(0)
    check(Two(*names, depths), states=lambda model: model.get_submodule(names[meant]).states)
    check(Two(*names, depths), module=names[1], states=lambda model: model.get_submodule(names[1]).states)


@pytest.mark.parametrize("depths", [(3, 5), (3, 3)])
@pytest.mark.parametrize(
    "names", [("vision", "text"), ("encoder", "momentum_encoder"), ("generator", "discriminator"), ("tower", "decoder")]
)
def test_two_transformers_of_equal_rank_are_named(names, depths):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"`module` must say .*{names[0]}, {names[1]}"):
        EntropyMonitor(Two(*names, depths))
    check(Two(*names, depths), module=names[0], states=lambda model: model.get_submodule(names[0]).states)


@pytest.mark.parametrize("make", [list, dict])
def test_towers_in_a_list_are_no_blocks(make):
    model = nn.Module()
    towers = {"text": GPT(), "image": GPT()}
    model.towers = nn.ModuleDict(towers) if make is dict else nn.ModuleList(towers.values())
    with pytest.raises(ValueError, match=r"`module` must say .*towers"):
        EntropyMonitor(model)


def test_two_lists_of_blocks_in_one_module():
    torch.manual_seed(0)

    class TwoLists(GPT):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.decoder_blocks = self.blocks
            del self.blocks
            self.lists = names
            for name in names:
                self.add_module(name, nn.ModuleList(Block() for _ in range(2)))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            self.states = [x]
            for block in self.get_submodule(self.lists[0]):
                x = block(x)
                self.states.append(x)
            for name in (*self.lists[1:], "decoder_blocks"):
                for block in self.get_submodule(name):
                    x = block(x)
            return self.norm(x)

    check(TwoLists("blocks"))  # as in a masked autoencoder
    with pytest.raises(ValueError, match=r"`module` must say .*: decoder_blocks, first, second"):
        EntropyMonitor(TwoLists("first", "second"))
    check(TwoLists("first", "second"), module="first")


class Heads(nn.Module):
    """Attention with a module for each head, and a bias for each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.bias = nn.ModuleList(Attention() for _ in range(2)), nn.Embedding(VOCABULARY, 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(head(x) for head in self.heads)  # type: ignore[return-value]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_list_of_heads_of_attention_is_no_stack(depth):
    torch.manual_seed(0)
    check(GPT(nn.ModuleList(Block(Heads) for _ in range(depth))))
