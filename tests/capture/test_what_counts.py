"""Which calls of a layer are counted: no generation, none without gradients beside one with, the last of several."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel, DynamicCache, T5Config, T5ForConditionalGeneration

from matent_callbacks import EntropyMonitor
from tests.conftest import collate, slow_pooled_entropy, text_examples

peft = pytest.importorskip("peft")

BATCH = {k: v for k, v in collate(text_examples(5)).items() if k != "labels"}
TOKENS = int(BATCH["attention_mask"].sum())
NEW = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def count(monitor: EntropyMonitor, layer: str = "last") -> int:
    return int(monitor._recording.accumulators[layer].tokens["pooled"].moments().num_tokens)


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("wrapped", ["plain", "PEFT", "around", "no grad"])
def test_generation_is_known_by_its_caller(make_llama, wrapped, use_cache):
    model = make_llama(dropout=0.0)
    if wrapped == "PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    monitor = EntropyMonitor(Around(model) if wrapped == "around" else model, "all")
    with monitor:
        model.generate(**BATCH, **NEW, use_cache=use_cache)
    assert {count(monitor, layer) for layer in monitor.layers} == {0}
    with monitor:
        model(**BATCH)
    assert {count(monitor, layer) for layer in monitor.layers} == {TOKENS}


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_of_an_encoder_decoder(use_cache):
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    monitors = [EntropyMonitor(model), EntropyMonitor(model, module="decoder")]
    with monitors[0], monitors[1]:
        model.generate(**BATCH, **NEW, use_cache=use_cache)
        assert [count(monitor) for monitor in monitors] == [0, 0]
        model(**BATCH, decoder_input_ids=BATCH["input_ids"][:, :4])
    assert [count(monitor) for monitor in monitors] == [TOKENS, 4 * len(BATCH["input_ids"])]


def test_a_model_of_ones_own_and_a_function_that_generate():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        @torch.no_grad()
        def generate(self, x: Tensor) -> Tensor:
            return torch.cat([x, self(x)[:, -1:]], dim=1)

    def generate(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x, model(x)[:, -1:]], dim=1)

    model, other, x = Model(), Model(), torch.randn(2, 5, 8)
    monitor = EntropyMonitor(model, "layer")
    with monitor:
        model.generate(x)
        generate(model, x)
        generate(model.layer, x)
        assert count(monitor, "layer") == 0
        model(other.generate(x))
    assert count(monitor, "layer") == 12


def test_a_decoding_loop_of_ones_own_counts_its_prompt(make_llama):
    model = make_llama(dropout=0.0).eval()

    class Decodes(Around):
        def forward(self, **batch: Tensor) -> Any:
            return decode(self.model)

    def decode(model: Any) -> Any:
        cache, ids = DynamicCache(config=model.config), BATCH["input_ids"]
        for _ in range(3):
            output = model(ids, past_key_values=cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
        return output

    for own in (model, Decodes(model)):
        monitor = EntropyMonitor(own)
        with monitor, torch.no_grad():
            decode(model) if own is model else own()
        assert count(monitor) == BATCH["input_ids"].numel()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_prefix_tuning_is_read_although_it_makes_a_cache(make_llama, training, around):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(make_llama(dropout=0.0), config)
    model = (Around(tuned) if around else tuned).train(training)
    monitor = EntropyMonitor(model, "all")
    monitor.start(training_only=training)
    model(**BATCH)
    if not training:
        tuned.generate(**BATCH, **NEW)
    monitor.stop()
    assert {count(monitor, layer) for layer in monitor.layers} == {TOKENS}


class Distils(Around):
    def __init__(self, model: nn.Module, order: str) -> None:
        super().__init__(model)
        self.order = order
        self.states: list[Tensor] = []

    def forward(self, **batch: Any) -> Tensor:
        for which in self.order.split():
            with torch.set_grad_enabled(which == "student"):
                noise = torch.randint_like(batch["input_ids"], 1, 60) if which == "teacher" else batch["input_ids"]
                state = self.model(input_ids=noise, attention_mask=batch["attention_mask"])
                self.states.append(state.last_hidden_state)
        return sum(state.square().mean() for state in self.states if state.requires_grad)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("order", ["teacher student", "student teacher", "teacher student teacher"])
def test_only_the_pass_with_gradients_counts_in_training(make_llama, order, reentrant):
    llama = make_llama(dropout=0.0)
    if reentrant is not None:
        llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        llama.enable_input_require_grads()
    model = Distils(llama.model, order).train()
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    monitor.start(training_only=True)
    model(**BATCH).backward()
    monitor.stop()
    assert {count(monitor, layer) for layer in monitor.layers} == {TOKENS}
    student = model.states[order.split().index("student")]
    expected = slow_pooled_entropy(student, BATCH["attention_mask"])
    assert monitor.compute()["matrix_entropy/last"] == pytest.approx(expected, abs=1e-6)


def test_a_frozen_part_that_only_runs_without_gradients_counts(make_llama):
    model = Distils(make_llama(dropout=0.0).model, "teacher").train()
    monitor = EntropyMonitor(model)
    monitor.start(training_only=True)
    model(**BATCH)
    monitor.stop()
    assert count(monitor) == TOKENS


@pytest.mark.parametrize("training", [False, True])
def test_the_scaling_pass_of_x_lora_does_not_count(make_llama, training, tmp_path):
    for index in range(2):
        torch.manual_seed(index)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(make_llama(dropout=0.0), config).save_pretrained(tmp_path / str(index))
    base = make_llama(dropout=0.0)
    base.config.use_cache = False
    adapters = {str(index): str(tmp_path / str(index)) for index in range(2)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    model = peft.get_peft_model(base, config).train(training)
    states: list[Tensor] = []
    base.model.register_forward_hook(lambda module, args, output: states.append(output[0].detach()))
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    monitor.start(training_only=training)
    model(**BATCH)
    monitor.stop()
    assert {count(monitor, layer) for layer in monitor.layers} == {TOKENS}
    expected = slow_pooled_entropy(states[-1], BATCH["attention_mask"])
    assert monitor.compute()["matrix_entropy/last"] == pytest.approx(expected, abs=1e-6)


class Block(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(3 * self.linear(x)))


class Looped(nn.Module):
    """Blocks that run again, as in a Universal Transformer, or a norm that they share with the model."""

    def __init__(self, kind: str, turns: int = 3) -> None:
        super().__init__()
        self.kind, self.turns = kind, turns
        self.norm = nn.LayerNorm(16)
        shared = self.norm if kind == "norm" else None
        blocks = [Block(shared), Block(shared)]
        self.blocks = nn.Sequential(*blocks) if kind == "sequential" else nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 if self.kind == "norm" else self.turns):
            if self.kind == "sequential":
                x = self.blocks(x)
            else:
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=True) if self.kind == "checkpoint" else block(x)
        return self.norm(x) if self.kind == "norm" else x.mul_(1) if not x.requires_grad else x


@pytest.mark.parametrize("kind", ["loop", "sequential", "norm", "checkpoint"])
def test_the_last_call_in_a_forward_counts(kind):
    torch.manual_seed(0)
    model = Looped(kind).train()
    names = {"last": "norm" if kind == "norm" else "blocks.1", "blocks.0": "blocks.0"}
    monitor = EntropyMonitor(model, list(names.values()), dtype=torch.float64)
    batches = torch.randn(3, 2, 9, 16)
    for _ in range(2):  # two readings: the first finds out, the second knows
        seen: dict[str, list[Tensor]] = {name: [] for name in names.values()}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, a, out, to=own: to.append(out.detach()))
            for name, own in seen.items()
        ]
        lasts: list[dict[str, Tensor]] = []
        monitor.start(training_only=True)
        for batch in batches:
            batch = batch.clone().requires_grad_()
            output = model(batch)
            lasts.append({name: own[-1] for name, own in seen.items()})
            output.sum().backward()
        monitor.stop()
        [hook.remove() for hook in hooks]
        found = monitor.compute()
        for name in names.values():
            expected = slow_pooled_entropy(torch.cat([own[name] for own in lasts]))
            assert found[f"matrix_entropy/{name}"] == pytest.approx(expected, abs=1e-6)
    assert not monitor._capture._events._forwards


def test_a_number_of_turns_that_changes_is_told_once():
    torch.manual_seed(0)
    model = Looped("loop", turns=1)
    monitor = EntropyMonitor(model, "blocks.1", dtype=torch.float64)
    batches = torch.randn(3, 2, 9, 16)
    outputs: list[Tensor] = []

    def run() -> None:
        with torch.no_grad(), monitor:
            model(batches[0])
            model.turns = 2
            outputs.extend(model(batch) for batch in batches[1:])

    with pytest.warns(UserWarning, match="'blocks.1' ran several times in a forward") as told:
        run()
    assert len(told) == 1
    assert monitor.compute()["matrix_entropy/blocks.1"] == pytest.approx(
        slow_pooled_entropy(torch.cat(outputs)), abs=1e-6
    )
    with warnings.catch_warnings(), torch.no_grad(), monitor:
        warnings.simplefilter("error")
        for model.turns in (1, 3):
            outputs.append(model(batches[0]))
    assert monitor.compute()["matrix_entropy/blocks.1"] == pytest.approx(
        slow_pooled_entropy(torch.cat(outputs[-2:])), abs=1e-6
    )


def test_shared_blocks_of_transformers():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=128,
        hidden_size=32,
        embedding_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = AlbertModel(config).eval()
    monitor = EntropyMonitor(model, ["last", "encoder.albert_layer_groups.0"], dtype=torch.float64)
    with monitor, torch.no_grad():
        states = model(**BATCH, output_hidden_states=True).hidden_states
    found = monitor.compute()
    for layer in monitor.layers:
        expected = slow_pooled_entropy(states[-1], BATCH["attention_mask"])
        assert found[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-6)


def test_two_passes_over_other_tokens_both_count_with_their_own_masks(make_llama):
    class Pair(Around):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, other: dict[str, Tensor]) -> Any:
            first = {"input_ids": input_ids, "attention_mask": attention_mask}
            return [self.model(**batch).last_hidden_state for batch in (first, other)]

    model = Pair(make_llama(dropout=0.0).model)
    other = copy.deepcopy(BATCH)
    other["attention_mask"] = (torch.arange(BATCH["input_ids"].shape[1]) < 3).long().repeat(5, 1)
    names = ["model.layers.1", "model.norm"]
    monitor = EntropyMonitor(model, names, dtype=torch.float64)
    with monitor, torch.no_grad():
        states = model(**BATCH, other=other)
    rows = [
        own[mask.bool()]
        for state, batch in zip(states, (BATCH, other), strict=True)
        for own, mask in zip(state, batch["attention_mask"], strict=True)
    ]
    found = monitor.compute()
    assert found["matrix_entropy/model.norm"] == pytest.approx(slow_pooled_entropy(rows), abs=1e-6)


def test_in_training_each_adapter_counts_but_none_that_is_switched_off(make_llama):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(make_llama(dropout=0.0), config)
    model.add_adapter("other", config)
    monitor = EntropyMonitor(model)
    for training_only, passes in ((True, 2), (False, 1)):
        model.set_adapter("default")
        monitor.start(training_only=training_only, same_adapters=True)
        model(**BATCH)
        with model.disable_adapter():
            model(**BATCH)
        model.set_adapter("other")
        model(**BATCH)
        monitor.stop()
        assert count(monitor) == passes * TOKENS
        monitor.reset()


class Fails(nn.Module):
    """Blocks of which the last one raises if it is told to, and a loop that tries again with half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.fails and block is self.blocks[-1]:
                self.fails = False
                raise RuntimeError("out of memory")
            x = block(x)
        return x

    def run(self, x: Tensor, *, by_forward: bool) -> Tensor:
        try:
            return self.forward(x) if by_forward else self(x)
        except RuntimeError:
            return self.run(x[:1], by_forward=by_forward)


@pytest.mark.parametrize("by_forward", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_a_forward_that_fails_counts_in_no_layer(before, by_forward, recwarn):
    torch.manual_seed(0)
    model, batch = Fails(), torch.randn(2, 9, 16)
    monitor = EntropyMonitor(model, "all")
    with monitor:
        for _ in range(before):
            model(batch)
        model.fails = True
        model.run(batch, by_forward=by_forward)
    assert {count(monitor, layer) for layer in monitor.layers} == {9}
    assert [str(w.message).partition(":")[0] for w in recwarn.list] == ["A forward failed in the middle"] * before
