"""In a model of one's own, ``last`` is what the norm gives that follows the blocks, where one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.capture.own_models import GPT, IDS, WIDTH, Outer, check, scaled
from tests.conftest import slow_pooled_entropy


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


@pytest.mark.parametrize("names", [("norm", "blocks"), ("norm0", "blocks"), ("blocks", "emb_norm", "norm")])
def test_a_class_of_ones_own_that_is_made_as_those_of_transformers(names):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    class Mine(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            gpt = GPT(2, names=("emb", *names))
            for name, child in gpt.named_children():
                self.add_module(name, child)
            self.out, self.final, self.of_embeddings = nn.Linear(WIDTH, 9), gpt.final, gpt.of_embeddings
            self.end = gpt.end

        def get_input_embeddings(self) -> nn.Module:
            return self.emb

        def forward(self, input_ids: Tensor) -> Tensor:
            states = GPT.forward(self, input_ids)  # type: ignore[arg-type]
            return self.out(states)

    check(Mine(transformers.LlamaConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2)), layers="last")
