"""Models of one's own: which modules are the blocks, where the last hidden state is, what is one pass."""

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


# Blocks


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


# The last hidden state


@pytest.mark.parametrize(
    "names",
    [
        ("emb", "norm", "blocks"),
        ("norm", "emb", "blocks"),
        ("emb", "ln_f*", "blocks"),
        ("emb", "blocks", "emb_norm", "norm"),
        ("emb", "blocks", "norm_a", "norm_b*"),
        ("emb", "norm_a", "norm_b*", "blocks"),
        ("emb", "norm_b*", "norm_a", "blocks"),
        ("emb", "norm0", "blocks"),  # blocks that normalise last
        ("emb", "ln_f", "norm0*", "blocks"),
        ("emb", "blocks", "norm0"),
        ("emb", "blocks"),
    ],
)
def test_the_norm_that_follows_the_blocks_is_found(names):
    torch.manual_seed(0)
    if "norm" in names or any(name.endswith("*") for name in names):
        check(GPT(names=names))
        check(GPT(names=names), layers="last")
    else:
        check(GPT(names=names))


@pytest.mark.parametrize("end", [nn.Dropout(0.5), lambda x: x + 1, lambda x: x.transpose(0, 1).transpose(0, 1).clone()])
@pytest.mark.parametrize(
    "names", [("emb", "norm", "blocks"), ("emb", "blocks", "emb_norm", "norm"), ("emb", "norm_a", "norm_b*", "blocks")]
)
def test_what_comes_between_the_blocks_and_the_norm(names, end):
    torch.manual_seed(0)

    class Between(GPT):
        def end(self, x: Tensor) -> Tensor:
            return end(x)

    check(Between(names=names))


def test_a_norm_in_a_head_is_not_the_final_one():
    torch.manual_seed(0)

    class WithHead(GPT):
        def __init__(self) -> None:
            super().__init__(names=("emb", "norm0", "blocks"))
            self.head_linear, self.head_norm, self.pooled_norm = (
                nn.Linear(WIDTH, WIDTH),
                nn.LayerNorm(WIDTH),
                nn.LayerNorm(WIDTH),
            )

        def forward(self, ids: Tensor) -> Any:
            x = super().forward(ids)
            return self.head_norm(self.head_linear(x).relu()), self.pooled_norm(x[:, 0])

    check(WithHead())


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


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [12, 4])
def test_a_norm_around_the_encoder_of_torch(batch_first, length):
    torch.manual_seed(0)
    check(Outer(batch_first), IDS[:, :length])


@pytest.mark.parametrize("names", [("emb", "blocks", "norm"), ("emb", "norm", "blocks")])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_a_norm_behind_compiled_blocks(names, layers, what):
    torch.manual_seed(0)
    model = scaled(GPT(names=names)).double()
    for block in model.blocks if what == "blocks" else [model]:
        block.compile(backend="eager")
    monitor = EntropyMonitor(model, layers, metrics="matrix_entropy", dtype=torch.float64)
    with monitor:
        model(IDS)
    expected = slow_pooled_entropy(model.states[-1].detach())
    assert monitor.compute()["matrix_entropy/last"] == pytest.approx(expected, abs=1e-9)


# Blocks around attention that takes the sequence first


class SequenceFirst(nn.Module):
    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns = turns
        self.attn, self.ln_1, self.mlp = nn.MultiheadAttention(WIDTH, 2), nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x.transpose(0, 1) if self.turns else x)
        y = self.attn(y, y, y, need_weights=False)[0]
        x = x + (y.transpose(0, 1) if self.turns else y)
        return x + self.mlp(x)


class Text(Own):
    """The layout of CLIP as it was published: the final norm is beside the module that has the blocks."""

    def __init__(self, turns: bool, copies: bool) -> None:
        super().__init__()
        self.turns, self.copies = turns, copies
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(SequenceFirst(turns) for _ in range(2)))
        self.transformer.forward = lambda x: self.transformer.resblocks(x)  # type: ignore[method-assign]
        self.ln_final = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.turn(self.token_embedding(ids))
        self.states = [self.turn(x)]
        hooks = [
            block.register_forward_hook(lambda module, given, output: self.states.append(self.turn(output)))
            for block in self.transformer.resblocks
        ]
        x = self.turn(self.transformer(x))
        for hook in hooks:
            hook.remove()
        self.states[-1] = self.ln_final(x)
        return self.states[-1]

    def turn(self, x: Tensor) -> Tensor:
        x = x if self.turns else x.permute(1, 0, 2)
        return x.contiguous() if self.copies else x


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("turns", [True, False])
def test_blocks_around_attention_that_takes_the_sequence_first(turns, copies):
    torch.manual_seed(0)
    check_sequences(Text(turns, copies), IDS)
    if not turns and not copies:
        check_sequences(Text(turns, copies), IDS[:, : len(IDS)])


def check_sequences(model: Any, ids: Tensor) -> None:
    model = scaled(model).double()
    monitor = EntropyMonitor(model, "all", metrics="sequence_matrix_entropy", dtype=torch.float64)
    for _ in range(2):
        with monitor:
            model(ids)
        for value, hidden in zip(monitor.compute().values(), model.states, strict=True):
            each = [slow_pooled_entropy(row[None].detach()) for row in hidden]
            assert value == pytest.approx(sum(each) / len(each), abs=1e-9)


class OfEmbeddings(Own):
    """Called with embeddings, whose shape tells nothing of the layout."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns, self.norm = turns, nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(SequenceFirst(turns) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.turns else x.transpose(0, 1).contiguous()
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        states[-1] = self.norm(states[-1])
        self.states = [state if self.turns else state.transpose(0, 1) for state in states]
        return states[-1]


@pytest.mark.parametrize("turns", [True, False])
def test_the_call_of_attention_shows_the_layout_of_the_blocks(turns):
    torch.manual_seed(0)
    model = OfEmbeddings(turns)
    embedded = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    check_sequences(model, embedded)
    monitor = EntropyMonitor(model, "all", metrics="sequence_matrix_entropy")
    with pytest.warns(UserWarning, match=r"read as \(T, B, d\)"), monitor:
        model(embedded[:, :4])


def test_tokens_that_are_given_sequence_first():
    torch.manual_seed(0)

    class Turned(Own):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.inner = nn.Embedding(VOCABULARY, WIDTH), OfEmbeddings(False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.inner(self.emb(ids).transpose(0, 1))
            self.states = self.inner.states
            return x

    check_sequences(Turned(), IDS.t().contiguous())


@pytest.mark.parametrize("size", [(4, 10), (8, 8)])
@pytest.mark.parametrize("name", ["xlnet", "fsmt"])
@pytest.mark.parametrize("masked", [True, False])
def test_models_of_transformers_that_take_the_sequence_first(name, size, masked):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "xlnet":
        config = transformers.XLNetConfig(d_model=32, n_head=4, d_inner=64, n_layer=2, vocab_size=VOCABULARY)
        model = transformers.XLNetLMHeadModel(config)
    else:
        sizes = {
            f"{part}_{what}": 4 if "heads" in what else 2 if what == "layers" else 64
            for part in ("encoder", "decoder")
            for what in ("layers", "attention_heads", "ffn_dim")
        }
        config = transformers.FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY,
            d_model=32,
            max_position_embeddings=64,
            **sizes,
        )
        model = transformers.FSMTForConditionalGeneration(config)
    ids = torch.randint(3, VOCABULARY, size)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if name == "fsmt" else {})
    mask = torch.ones_like(ids)
    if masked:
        mask[0, 4:] = mask[1, 3:] = 0
        inputs["attention_mask"] = mask
    monitor = EntropyMonitor(model.eval(), "all", metrics="sequence_matrix_entropy", dtype=torch.float64)
    with monitor, torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    states = output.encoder_hidden_states if name == "fsmt" else output.hidden_states
    for value, hidden in zip(monitor.compute().values(), states, strict=True):
        each = [slow_pooled_entropy(row[kept.bool()][None]) for row, kept in zip(hidden, mask, strict=True)]
        assert value == pytest.approx(sum(each) / len(each), abs=1e-5)


# Passes


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


class Siamese(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.ends = encoder, []

    def forward(self, a: Tensor, b: Tensor) -> None:
        self.ends = [self.encoder(ids) for ids in (a, b)]


@pytest.mark.parametrize("length", [12, 5])
@pytest.mark.parametrize(
    "make",
    [
        GPT,
        Encoder,
        lambda: GPT(names=("emb", "norm0", "blocks")),
        lambda: GPT(names=("norm", "emb", "blocks")),
        lambda: Outer(True),
    ],
)
def test_an_own_encoder_that_is_called_twice_reads_both(make, length):
    torch.manual_seed(0)
    model = scaled(Siamese(make())).double()
    a, b = IDS, (IDS.flip(0) + 1)[:, :length] % VOCABULARY
    monitor = EntropyMonitor(model, metrics="matrix_entropy", dtype=torch.float64)
    for grad in (True, False, True):
        with monitor, torch.set_grad_enabled(grad):
            model(a, b)
        ends = [nn.functional.pad(end.detach(), (0, 0, 0, 12 - end.shape[1])) for end in model.ends]
        counted = torch.cat([torch.arange(12).expand(4, 12) < end.shape[1] for end in model.ends])
        expected = slow_pooled_entropy(torch.cat(ends), counted)
        assert monitor.compute()["matrix_entropy/last"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("again", [lambda y, x: y, lambda y, x: y + x, lambda y, x: nn.functional.dropout(y, 0.1)])
def test_an_own_stack_that_runs_in_a_loop_counts_once(again):
    torch.manual_seed(0)

    class Universal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.stack = nn.Embedding(VOCABULARY, WIDTH), Encoder().encoder

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            self.end = self.stack(x)
            for _ in range(2):
                self.end = self.stack(again(self.end, x))
            return self.end

    model = Universal().double()
    monitor = EntropyMonitor(model, metrics="matrix_entropy", dtype=torch.float64)
    for _ in range(2):
        with monitor:
            model(IDS)
        assert monitor.compute()["matrix_entropy/last"] == pytest.approx(
            slow_pooled_entropy(model.end.detach()), abs=1e-9
        )


# What goes into the first block, and blocks that are in the stack several times


class Conditioned(Block):
    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        return super().forward(x + c)


class ByKeyword(Block):
    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)


class Unnamed(Block):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a + b)


class OfVectors(Block):
    def forward(self, vector: Tensor, tensor: Tensor) -> Tensor:
        return super().forward(tensor + vector.unsqueeze(1))


@pytest.mark.parametrize("kind", [Conditioned, ByKeyword, OfVectors, Unnamed])
def test_the_hidden_states_among_the_arguments_of_the_first_block(kind):
    torch.manual_seed(0)

    class Model(GPT):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            condition = torch.randn_like(x[:, 0] if kind is OfVectors else x)
            self.states = [x]
            for block in self.blocks:
                x = block(x=x) if kind is ByKeyword else block(x, condition) if kind is Unnamed else block(condition, x)
                self.states.append(x)
            self.states[-1] = self.norm(x)
            return x

    model = Model(nn.ModuleList(kind() for _ in range(2)))
    if kind is Unnamed:
        with pytest.warns(UserWarning, match="'layer_00' is read at the first tensor that Unnamed is called with"):
            check(model)
    else:
        check(model)


def test_blocks_that_are_in_the_stack_several_times():
    torch.manual_seed(0)
    one, other = Block(), Block()
    model = scaled(GPT(nn.ModuleList([one, one, other, Block(), other]))).double()
    with pytest.raises(ValueError, match="`layers` asks for 1, but the blocks that give layer_01 run again"):
        EntropyMonitor(model, 1)
    with pytest.warns(UserWarning, match="leaves out some of 'all': the blocks that give layer_01, layer_03 run again"):
        monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    for _ in range(2):
        with monitor:
            model(IDS)
        readings = monitor.compute()
        assert list(readings) == [f"matrix_entropy/{key}" for key in ("layer_00", "layer_02", "layer_04", "last")]
        for value, index in zip(readings.values(), (0, 2, 4, 5), strict=True):
            assert value == pytest.approx(slow_pooled_entropy(model.states[index].detach()), abs=1e-9)
