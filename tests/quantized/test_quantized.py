"""Models with quantized weights, under LoRA: what is read of them, and that their training stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matent_callbacks import EntropyMonitor
from matent_callbacks.capture.inference import side_effect_free
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, llama, slow_pooled_entropy, text_examples

LAYERS = ["layer_00", "layer_01", "layer_02", "last"]


def bitsandbytes(**settings: Any) -> tuple[str, Callable[[], Any]]:
    def make() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**settings)

    return "bitsandbytes", make


def torchao(bits: int) -> tuple[str, Callable[[], Any]]:
    def make() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from transformers import TorchAoConfig

        # `Int4WeightOnlyConfig` packs for GPUs only.
        return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4))

    return "torchao", make


class Repacking(torch.nn.Linear):
    """As bitsandbytes' 4-bit layers on a CPU with AVX-512: the first forward in evaluation changes the weights."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.support_avx512bf16_for_cpu = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.weight.data = self.weight.data.bfloat16().float()
        return super().forward(x)


def test_a_probe_does_not_make_a_layer_repack_its_weights():
    layer = Repacking()
    model = torch.nn.Sequential(layer)
    before = layer.weight.detach().clone()
    with side_effect_free(model):
        model(torch.ones(1, 4))
    assert torch.equal(layer.weight, before)
    model.eval()(torch.ones(1, 4))
    assert not torch.equal(layer.weight, before)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "nf4": bitsandbytes(**NF4),
    "nf4, double quantization, bfloat16": bitsandbytes(
        **NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao(8),
    "torchao int4": torchao(4),
}


@pytest.fixture
def make_model(kind: str, tmp_path: Path) -> Callable[[], Any]:
    """The same quantized model at each call, with LoRA, prepared for training with gradient checkpointing."""
    package, make_config = KINDS[kind]
    pytest.importorskip(package)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    llama(hidden=64).save_pretrained(tmp_path / "model")

    def make() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=make_config(), device_map={"": "cpu"}, dtype=torch.float32
        )
        weight = model.model.layers[0].mlp.up_proj.weight
        assert type(weight) is not torch.nn.Parameter
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"]))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_readings_are_those_of_its_hidden_states(make_model):
    model = make_model().eval()
    batch = collate(text_examples(6))
    monitor = EntropyMonitor(model, "all", exclude_sinks=False)
    with torch.no_grad(), monitor:
        states = model(**batch, output_hidden_states=True).hidden_states
    values = monitor.compute()
    assert len(states) == len(LAYERS)
    for layer, hidden in zip(LAYERS, states, strict=True):
        expected = slow_pooled_entropy(hidden.detach(), batch["attention_mask"])
        assert values[f"matrix_entropy/{layer}"] == pytest.approx(expected, rel=1e-4)


# The Trainer refuses the other kinds of torchao.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao int4"])
@pytest.mark.parametrize("probe", [None, collate(text_examples(3, start=90))], ids=["training forwards", "probe"])
def test_training_is_bitwise_the_same(make_model, make_trainer, probe):
    def train(callbacks: list[Any]) -> tuple[list[Any], dict[str, torch.Tensor], list[Any]]:
        model = make_model()
        trainer = make_trainer(callbacks, model=model, eval_strategy="steps", eval_steps=3, learning_rate=1e-2)
        trainer.train()
        losses = [r[key] for r in trainer.state.log_history for key in ("loss", "eval_loss") if key in r]
        return losses, {k: v for k, v in model.named_parameters() if v.requires_grad}, trainer.state.log_history

    watched = train([MatrixEntropyCallback(2, "all", probe=probe, on_error="raise")])
    alone = train([])
    assert watched[0] == alone[0]
    assert watched[1]
    for name, weight in watched[1].items():
        assert torch.equal(weight, alone[1][name]), name
    assert any(weight.abs().sum() > 0 for name, weight in watched[1].items() if "lora_B" in name)
    for layer in LAYERS:
        assert [r["step"] for r in watched[2] if f"effective_rank/{layer}" in r] == [2, 4, 6]
        assert [r["step"] for r in watched[2] if f"eval_effective_rank/{layer}" in r][:2] == [3, 6]
