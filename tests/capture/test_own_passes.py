"""What is one pass over a model of one's own, and what goes into it; blocks that run again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.capture.own_models import GPT, IDS, VOCABULARY, WIDTH, Block, Encoder, Outer, check, scaled
from tests.conftest import slow_pooled_entropy


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
