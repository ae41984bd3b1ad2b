"""What a module keeps besides its parameters is after inference what it was before."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.inference import side_effect_free


class Keeps(nn.Module):
    """Keeps statistics of its forwards in all kinds of attributes, some written to in place, some replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = [nn.Parameter(torch.ones(3), requires_grad=False)]
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("last", None)
        self.momentum = torch.zeros(3)
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.seen: set[float] = set()
        self.nested: dict[str, Any] = {"ema": torch.zeros(3), "steps": {"done": [0]}}
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.queue.copy_(torch.cat([self.queue[1:], x.mean(0, keepdim=True)]))
        self.last = x.clone()
        self.momentum.mul_(0.9).add_(x.mean(0))
        for kept in (self.history.append, self.recent.append, self.seen.add):
            kept(x.sum().item())
        self.nested["ema"].mul_(0.9).add_(x.mean(0))
        self.nested["steps"]["done"].append(self.steps)
        self.nested[f"step {self.steps}"] = self.steps
        self.steps += 1
        return x


def state(module: Keeps) -> dict[str, Any]:
    kept = {name: value for name, value in {**vars(module), **module._buffers}.items() if name[0] != "_"}
    return copy.deepcopy({**kept, "seen": sorted(module.seen), "recent": list(module.recent)})


def test_lists_dicts_tensors_and_buffers_are_what_they_were():
    module = Keeps()
    module(torch.randn(2, 3))
    before, objects = state(module), {name: id(value) for name, value in vars(module).items()}
    version = module.frozen[0]._version
    with side_effect_free(module):
        for _ in range(3):
            module(torch.randn(2, 3))
        module.history = []
    torch.testing.assert_close(state(module), before, rtol=0, atol=0)
    assert {name: id(value) for name, value in vars(module).items() if name in objects} == objects
    assert module.frozen[0]._version == version
