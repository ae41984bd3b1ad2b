"""Blocks that take the sequence first: of one's own, and of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.capture.own_models import IDS, VOCABULARY, WIDTH, FeedForward, Own, scaled
from tests.conftest import slow_pooled_entropy
from tests.versions import needs


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
@pytest.mark.parametrize("name", ["xlnet", pytest.param("fsmt", marks=needs("transformers", "5.0"))])
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
