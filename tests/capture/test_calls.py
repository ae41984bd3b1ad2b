"""However a model is called, and by however many threads, its layers are read, and it runs as if nobody watched."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matent_callbacks import EntropyMonitor
from tests.conftest import collate, slow_pooled_entropy, text_examples

LAYERS = ("layer_00", "layer_01", "layer_02", "last")
BATCHES = [collate(text_examples(5, start=start)) for start in (0, 5)]


def definition(model: Any, *batches: dict[str, Tensor]) -> dict[str, float]:
    """Of all tokens of the batches, by the model's own hidden states."""
    # A copy: before 5.0 transformers leaves a `forward` behind in the layers of a model that is asked for these.
    model = copy.deepcopy(model)
    with torch.no_grad():
        states = [model(**b, output_hidden_states=True).hidden_states for b in batches]
    masks = [b["attention_mask"].bool() for b in batches]
    return {
        f"matrix_entropy/{layer}": slow_pooled_entropy(
            [
                row[tokens]
                for own, mask in zip(states, masks, strict=True)
                for row, tokens in zip(own[i], mask, strict=True)
            ]
        )
        for i, layer in enumerate(LAYERS)
    }


class Wrapper(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.model.model.forward(batch["input_ids"], batch["attention_mask"])


WAYS = {
    "the model": lambda model, batch: model(**batch),
    "its forward": lambda model, batch: model.forward(**batch),
    "the transformer": lambda model, batch: model.model(batch["input_ids"], attention_mask=batch["attention_mask"]),
    "the forward of the transformer": lambda model, batch: model.model.forward(
        batch["input_ids"], batch["attention_mask"]
    ),
    "a wrapper": lambda model, batch: Wrapper(model)(batch),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_ways_to_call(way, make_llama):
    model = make_llama(dropout=0.0)
    monitors = [EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64) for _ in range(2)]
    with monitors[0]:
        for batch in BATCHES:
            WAYS[way](model, batch)
    expected = definition(model, *BATCHES)
    assert monitors[0].compute() == pytest.approx(expected, abs=1e-9)
    # Several at once, begun and ended in any order.
    monitors[0].start()
    monitors[1].start()
    WAYS[way](model, BATCHES[0])
    monitors[0].stop()
    WAYS[way](model, BATCHES[1])
    monitors[1].stop()
    assert monitors[0].compute() == pytest.approx(definition(model, BATCHES[0]), abs=1e-9)
    assert monitors[1].compute() == pytest.approx(expected, abs=1e-9)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_wrapper_that_is_the_model(make_llama):
    model = Wrapper(make_llama(dropout=0.0))
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    for way in (model, model.forward):
        with monitor:
            getattr(way, "__self__", model).forward(BATCHES[0]) if way is not model else model(BATCHES[0])
        assert monitor.compute() == pytest.approx(definition(model.model, BATCHES[0]), abs=1e-9)


def test_a_forward_that_others_put_there_stays(make_llama):
    model = make_llama(dropout=0.0)
    calls: list[str] = []
    whole = model.model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append("own")
        return whole(*args, **kwargs)

    model.model.forward = own
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    expected = definition(model, BATCHES[0])
    with monitor:
        model(**BATCHES[0])
        # Around the one that watches, and not taken away.
        watched = model.model.forward
        model.model.forward = lambda *args, **kwargs: (calls.append("outer"), watched(*args, **kwargs))[1]
        model(**BATCHES[1])
    assert monitor.compute() == pytest.approx(definition(model, *BATCHES), abs=1e-9)
    calls.clear()
    with monitor:
        model.model.forward(BATCHES[0]["input_ids"], BATCHES[0]["attention_mask"])
    assert calls == ["outer", "own"]
    assert monitor.compute() == pytest.approx(expected, abs=1e-9)


def test_an_exception_leaves_nothing(make_llama):
    model = make_llama(dropout=0.0)
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    with monitor:
        for forward in (model, model.forward, model.model.forward):
            with pytest.raises(IndexError):
                forward(torch.tensor([[10_000]]))
        model(**BATCHES[0])
    assert monitor.compute() == pytest.approx(definition(model, BATCHES[0]), abs=1e-9)


def test_threads_are_each_in_a_forward_of_their_own(make_llama):
    """Two forwards at once, which before_calls in the middle of each block."""
    model = make_llama(dropout=0.0)
    expected = definition(model, *BATCHES)
    barrier = threading.Barrier(2, timeout=60)
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_: [barrier.wait(), None][1])
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    failures: list[BaseException] = []

    def run(call: Any, batch: dict[str, Tensor]) -> None:
        try:
            call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        except BaseException as error:
            failures.append(error)

    with monitor:
        threads = [
            threading.Thread(target=run, args=(call, batch))
            for call, batch in zip((model, model.model.forward), BATCHES, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert monitor.compute() == pytest.approx(expected, abs=1e-9)


def replicate(model: nn.Module) -> nn.Module:
    """What ``nn.DataParallel`` does, with parameters on the same device: shallow copies, each of its own modules."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = child if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:  # not those of the original, so that it is seen whose are used
                setattr(replica, name, parameter.detach() * 1.5)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return copies[model]


@pytest.mark.parametrize("way", ["the model", "the transformer", "a wrapper"])
def test_replicas_of_data_parallel(way, make_llama):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama(dropout=0.0)

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return WAYS[way](self.inner, batch)

    model = Model()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    outputs: list[Any] = [None, None]
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    with monitor:
        replicas = [replicate(model) for _ in range(2)]

        def run(index: int) -> None:
            outputs[index] = replicas[index](BATCHES[index])[0].detach()

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(o, scaled(b)[0]) for o, b in zip(outputs, BATCHES, strict=True))
    assert monitor.compute() == pytest.approx(definition(scaled.inner, *BATCHES), abs=1e-9)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_graph_around_the_model_is_compiled_twice_at_most(make_llama):
    """Hooks do not fire in it, and a watched model is another one to it than an unwatched one: not at every reading."""
    model = make_llama(dropout=0.0)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(lambda batch: model.model(batch).last_hidden_state, backend=backend)
    ids = BATCHES[0]["input_ids"]
    try:
        alone = step(ids)
        once = len(graphs)
        monitor = EntropyMonitor(model)
        for _ in range(4):
            with monitor:
                assert torch.equal(step(ids), alone)
            assert torch.equal(step(ids), alone)
        for _ in range(3):
            with EntropyMonitor(model):
                step(ids)
        assert len(graphs) <= 2 * once
    finally:
        torch._dynamo.reset()


def test_a_compiled_model_may_run_twice_before_the_backward_pass():
    """What is restored after a forward beside the graph is not written to, where the backward pass needs it."""

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", torch.arange(6).unsqueeze(0))
            self.embedding = torch.nn.Embedding(6, 8)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + self.embedding(self.ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    model = Positions()
    batches = torch.randn(2, 3, 6, 8)
    try:
        compiled = torch.compile(model, backend="eager")
        monitor = EntropyMonitor(compiled, "layers.1")
        with monitor:
            sum(compiled(batch).square().sum() for batch in batches).backward()
        assert model.embedding.weight.grad is not None
        assert monitor.compute().keys() == {"matrix_entropy/layers.1", "effective_rank/layers.1"}
    finally:
        torch._dynamo.reset()


def test_a_compiled_forward_is_read_beside_its_graph(make_llama):
    model = make_llama(dropout=0.0)
    expected = definition(model, BATCHES[0])
    graphs: list[Any] = []
    model.forward = torch.compile(model.forward, backend=lambda graph, inputs: graphs.append(graph) or graph)
    try:
        model(**BATCHES[0])
        once = len(graphs)
        monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
        for _ in range(3):
            with monitor:
                model(**BATCHES[0])
            assert monitor.compute() == pytest.approx(expected, abs=1e-9)
        assert len(graphs) == once
    finally:
        torch._dynamo.reset()
