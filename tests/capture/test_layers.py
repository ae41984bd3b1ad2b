"""Layers are the hidden states that the model itself gives, on real architectures built small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from matent_callbacks import EntropyMonitor
from matent_callbacks.capture.layers import resolve_layers
from tests.conftest import VOCABULARY, slow_pooled_entropy
from tests.versions import older

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}


def build(name: str) -> Any:
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4)),
        "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, intermediate_size=64)),
        "t5 encoder": lambda: T5EncoderModel(T5Config(**T5)),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**SMALL, intermediate_size=64, head_dim=8, num_key_value_heads=2)
        ),
        "mixture of experts": lambda: MixtralForCausalLM(
            MixtralConfig(**SMALL, intermediate_size=64, num_local_experts=4, num_key_value_heads=2)
        ),
    }
    return made[name]().eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5 encoder", "qwen3", "mixture of experts"])
def test_all_layers_are_the_hidden_states_of_the_model(name, batch):
    model = build(name)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    monitor = EntropyMonitor(model, layers="all", dtype=torch.float64)
    with monitor, torch.no_grad():
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    readings = monitor.compute()
    names = ["layer_00", "layer_01", "layer_02", "last"]
    assert list(readings) == [f"{metric}/{n}" for metric in ("matrix_entropy", "effective_rank") for n in names]
    for layer, hidden in zip(names, hidden_states, strict=True):
        expected = slow_pooled_entropy(hidden, batch["attention_mask"])
        assert readings[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-9)


def read_all(model: Any, **inputs: Any) -> tuple[dict[str, float], Any]:
    monitor = EntropyMonitor(model, "all", metrics="matrix_entropy", dtype=torch.float64)
    with monitor, torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return {key.removeprefix("matrix_entropy/"): value for key, value in monitor.compute().items()}, output


def test_a_tuple_without_embeddings_is_numbered_otherwise(batch):
    """The ``hidden_states`` of Mamba begin behind the first block, and have the last block without the norm, too."""
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8)
    ).eval()
    readings, output = read_all(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(output.hidden_states) == 4
    embeddings = model.backbone.embeddings(batch["input_ids"]).detach()
    ours = [embeddings, *output.hidden_states[:2], output.hidden_states[-1]]
    assert list(readings) == ["layer_00", "layer_01", "layer_02", "last"]
    for value, hidden in zip(readings.values(), ours, strict=True):
        assert value == pytest.approx(slow_pooled_entropy(hidden, batch["attention_mask"]), abs=1e-9)


def test_last_is_after_the_final_norm_also_where_the_tuple_ends_before_it():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    readings, output = read_all(model, pixel_values=torch.randn(4, 3, 32, 32))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state) is older("transformers", "5.0")
    for value, hidden in zip(readings.values(), [*output.hidden_states[:-1], output.last_hidden_state], strict=True):
        assert value == pytest.approx(slow_pooled_entropy(hidden), abs=1e-9)


def test_blocks_that_share_weights(batch):
    """There is one module, which is called for each layer: what goes into it first, and what the model gives."""
    torch.manual_seed(0)
    model = AlbertModel(AlbertConfig(**SMALL, embedding_size=16, intermediate_size=64)).eval()
    readings, output = read_all(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert list(readings) == ["layer_00", "last"]
    for value, hidden in zip(readings.values(), [output.hidden_states[0], output.hidden_states[-1]], strict=True):
        assert value == pytest.approx(slow_pooled_entropy(hidden, batch["attention_mask"]), abs=1e-9)
    # Once for each of two forwards that are one of a model around it.
    both = nn.Module()
    both.model = model
    both.forward = lambda **inputs: (model(**inputs), model(**inputs))  # type: ignore[method-assign]
    monitor = EntropyMonitor(both, "layer_00")
    with monitor:
        both(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert (
        monitor._recording.accumulators["layer_00"].tokens["pooled"].moments().num_tokens
        == 2 * batch["attention_mask"].sum()
    )


def test_encoder_decoder_reads_the_encoder_and_on_request_the_decoder(batch):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()
    decoder_mask = torch.ones(6, 5, dtype=torch.long)
    decoder_mask[0, 3:] = 0
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": batch["input_ids"][:, :5],
        "decoder_attention_mask": decoder_mask,
    }
    for module, states, mask in [
        (None, "encoder_hidden_states", batch["attention_mask"]),
        ("decoder", "decoder_hidden_states", decoder_mask),
    ]:
        monitor = EntropyMonitor(model, layers=[1, "last"], module=module, dtype=torch.float64)
        with monitor, torch.no_grad():
            output = model(**inputs, output_hidden_states=True, use_cache=False)
        readings = monitor.compute()
        for layer, index in [("layer_01", 1), ("last", -1)]:
            expected = slow_pooled_entropy(output[states][index], mask)
            assert readings[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ("last", ["last"]),
        (-1, ["last"]),
        (3, ["last"]),
        (0, ["layer_00"]),
        (-2, ["layer_02"]),
        ("all", ["layer_00", "layer_01", "layer_02", "last"]),
        ("every:2", ["layer_00", "layer_02"]),
        ("every:3", ["layer_00", "last"]),
        ("layer_01", ["layer_01"]),
        ([1, "last", -1], ["layer_01", "last"]),
        ("model.layers.*.mlp", ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]),
        (["model.norm", 0], ["model.norm", "layer_00"]),
    ],
)
def test_ways_to_name_layers(layers, keys):
    assert [point.key for point in resolve_layers(build("llama"), layers).points] == keys


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("model.layers.0.mpl", ValueError, r"'model.layers.0.mpl'.*Near matches: .*model.layers.0.mlp"),
        ("lats", ValueError, r"'lats'.*Near matches: last"),
        ("*.nothing", ValueError, r"`layers` asks for '\*.nothing'"),
        (4, ValueError, r"`layers` asks for 4, but the model has 3 blocks"),
        (-5, ValueError, r"`layers` asks for -5, but the model has 3 blocks"),
        ("layer_09", ValueError, r"`layers` asks for 'layer_09', but the model has 3 blocks"),
        ("every:0", ValueError, r"`layers` must be like 'every:4', .* got 'every:0'"),
        ("every:x", ValueError, r"`layers` must be like 'every:4', .* got 'every:x'"),
        ("layer_norm", ValueError, r"`layers` asks for 'layer_norm', and no module"),
        ([], ValueError, r"`layers` must name at least one layer"),
        ([1.5], TypeError, r"`layers` must hold names and ints, got 1.5 \(float\)"),
        (True, TypeError, r"`layers` must hold names and ints, got True \(bool\)"),
    ],
)
def test_unknown_layers_are_named_with_near_matches(layers, error, message):
    with pytest.raises(error, match=message):
        EntropyMonitor(build("llama"), layers=layers)


def test_no_stack_and_unknown_module_are_named():
    with pytest.raises(ValueError, match="`layers` needs a stack of blocks"):
        EntropyMonitor(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"`module` asks for 'modle'.*Near matches: model"):
        EntropyMonitor(build("llama"), module="modle")


class OwnGPT(nn.Module):
    """A model of one's own: blocks in a list, a final norm, a head."""

    def __init__(self, norm: bool, container: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)]
        # A list as most have it, or the Sequential of timm and torchvision.
        self.blocks = nn.ModuleList(blocks) if container is nn.ModuleList else nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(16) if norm else nn.Identity()
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.states = [self.embed(input_ids)]
        for block in self.blocks:
            self.states.append(block(self.states[-1], src_key_padding_mask=attention_mask == 0))
        self.states.append(self.ln_f(self.states[-1]))
        return self.head(self.states[-1])


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("norm", [True, False])
def test_own_module_with_positional_arguments(batch, norm, container):
    torch.manual_seed(0)
    model = OwnGPT(norm, container)
    monitor = EntropyMonitor(model, layers="all", dtype=torch.float64)
    with monitor:
        model(batch["input_ids"], batch["attention_mask"])
    readings = monitor.compute()
    for layer, hidden in zip(["layer_00", "layer_01", "last"], [*model.states[:2], model.states[-1]], strict=True):
        expected = slow_pooled_entropy(hidden.detach(), batch["attention_mask"])
        assert readings[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["layer_0", "layer_00", "last", "all"])
def test_an_own_module_may_be_called_as_a_layer_is(name):
    torch.manual_seed(0)
    model = nn.Module()
    model.add_module(name, nn.Linear(8, 8))
    model.head = nn.Linear(8, 3)
    model.forward = lambda x: model.head(getattr(model, name)(x))  # type: ignore[method-assign]
    inputs = torch.randn(2, 6, 8)
    monitor = EntropyMonitor(model, name, metrics="matrix_entropy", dtype=torch.float64)
    with monitor:
        model(inputs)
    expected = slow_pooled_entropy(getattr(model, name)(inputs).detach())
    assert monitor.compute() == {f"matrix_entropy/{name}": pytest.approx(expected, abs=1e-6)}


def test_where_there_is_a_stack_its_layers_come_first():
    model = OwnGPT(True, nn.ModuleList)
    model.last, model.all, model.layer_01, model.layer_0 = (nn.Linear(16, 9) for _ in range(4))
    points = resolve_layers(model, ["last", "layer_01", "layer_0"]).points
    assert [(point.key, point.module) for point in points] == [
        ("last", model.ln_f),
        ("layer_01", model.blocks[0]),
        ("layer_0", model.layer_0),
    ]
    assert [point.key for point in resolve_layers(model, "all").points] == ["layer_00", "layer_01", "last"]
    llama = build("llama")
    llama.layer_1 = nn.Linear(4, 4)
    assert resolve_layers(llama, "layer_1").points[0].module is llama.model.layers[0]


class AttentionInOneList(nn.Module):
    """Blocks that are no modules: their parts are in parallel lists."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))


def test_attention_alone_is_no_block():
    with pytest.raises(ValueError, match=r"separate lists \(attentions, ffns\).*`module`"):
        EntropyMonitor(AttentionInOneList())


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ("all", ["layer_06", "layer_07", "layer_08"]),
        ("every:2", ["layer_06", "layer_08"]),
        ([7, "layer_08", -1], ["layer_07", "layer_08"]),
        (5, ["layer_05"]),
    ],
)
def test_a_stage_of_a_pipeline_has_the_numbers_of_the_whole_model(layers, keys):
    blocks = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))))
    assert [point.key for point in resolve_layers(blocks, layers, layer_offset=5).points] == keys


def test_a_first_stage_is_not_the_whole_model():
    blocks = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))))
    assert [point.key for point in resolve_layers(blocks, "all", layer_offset=0).points] == [
        "layer_00",
        "layer_01",
        "layer_02",
    ]
    assert [point.key for point in resolve_layers(blocks, "all").points] == ["layer_00", "layer_01", "last"]


@pytest.mark.parametrize(
    ("layers", "offset", "message"),
    [
        (4, 5, r"asks for 4, but the model has 3 blocks: 5 \(what goes into the first\) to 8 \('last'\), or -1 to -4"),
        (9, 5, "asks for 9, but the model has 3 blocks"),
        ("all", -1, "`layer_offset` must be None or a whole number, 0 or more, got -1"),
        ("all", True, "`layer_offset` must be None or a whole number, 0 or more, got True"),
    ],
)
def test_layers_that_a_stage_does_not_have(layers, offset, message):
    blocks = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))))
    with pytest.raises(ValueError, match=message):
        resolve_layers(blocks, layers, layer_offset=offset)
