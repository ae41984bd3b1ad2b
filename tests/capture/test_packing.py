"""Documents in one row are told apart by whatever mark of packing a model is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from matent_callbacks import EntropyMonitor
from matent_callbacks.capture.packing import find_packing
from tests.conftest import slow_pooled_entropy
from tests.versions import needs

LENGTHS = [[5, 4, 3], [6, 2, 2]]
"""Of the documents in each row; two tokens of the second row are padding."""
SIZE = 12


def numbers() -> Tensor:
    rows = [[n + 1 for n, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    return torch.tensor([row + [0] * (SIZE - len(row)) for row in rows])


def positions() -> Tensor:
    rows = [[p for length in row for p in range(length)] for row in LENGTHS]
    return torch.tensor([row + [0] * (SIZE - len(row)) for row in rows])


def sees(rule: str) -> Tensor:
    own = numbers()
    same = (own.unsqueeze(1) == own.unsqueeze(2)) & (own > 0).unsqueeze(1)
    rules = {"causal": same.tril(), "both ways": same, "window": same.tril() & same.triu(-2)}
    return rules[rule].unsqueeze(1)


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


PADDING = (numbers() > 0).long()
M_ROPE = positions().expand(3, -1, -1)
MARKS: dict[str, dict[str, Tensor]] = {
    "position ids": {"position_ids": positions(), "attention_mask": PADDING},
    "position ids from 2 on": {"position_ids": positions() + 2, "attention_mask": PADDING},
    "position ids, M-RoPE": {"position_ids": M_ROPE, "attention_mask": PADDING},
    "position ids, M-RoPE with text": {
        "position_ids": torch.cat([positions()[None], torch.arange(SIZE).expand(3, 2, -1)]),
        "attention_mask": PADDING,
    },
    "numbers": {"attention_mask": numbers()},
    "numbers, floating": {"attention_mask": numbers().double()},
    "seq_idx": {"seq_idx": numbers(), "attention_mask": PADDING},
    "ends": {
        "cu_seq_lens_q": torch.tensor([0, 5, 9, 12, 18, 20, 22], dtype=torch.int32),
        "attention_mask": PADDING,
    },
    **{f"pairs, {rule}": {"attention_mask": sees(rule)} for rule in ("causal", "both ways", "window")},
    "pairs, added": {"attention_mask": added(sees("causal"))},
    "pairs, added, both ways": {"attention_mask": added(sees("both ways"))},
    "pairs and position ids": {"attention_mask": sees("causal"), "position_ids": positions()},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16, dtype=torch.float64)

    def forward(self, x: Tensor, **marks: Any) -> Tensor:
        return self.layer(x)


def documents(states: Tensor) -> list[Tensor]:
    rows = (row[:used].split(own) for row, used, own in zip(states, map(sum, LENGTHS), LENGTHS, strict=True))
    return [document for row in rows for document in row]


@pytest.mark.parametrize("mark", list(MARKS))
def test_each_document_is_a_sequence(mark):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, SIZE, 8, dtype=torch.float64)
    monitor = EntropyMonitor(model, "layer", dtype=torch.float64)
    with monitor:
        output = model(x, **MARKS[mark])
    expected = slow_pooled_entropy(documents(output))
    assert monitor.compute()["matrix_entropy/layer"] == pytest.approx(expected, abs=1e-9)
    assert expected != pytest.approx(slow_pooled_entropy(output, PADDING), abs=1e-3)


def test_rows_that_are_packed_alike():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, SIZE, 8, dtype=torch.float64)
    monitor = EntropyMonitor(model, "layer", dtype=torch.float64)
    for marks in ({"position_ids": positions()[:1]}, {"attention_mask": sees("causal")[:1]}):
        with monitor:
            output = model(x, **marks)
        expected = slow_pooled_entropy([part for row in output for part in row.split(LENGTHS[0])])
        assert monitor.compute()["matrix_entropy/layer"] == pytest.approx(expected, abs=1e-9)


def test_a_mask_of_the_user_holds_inside_of_documents():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, SIZE, 8, dtype=torch.float64)
    own = torch.ones(2, SIZE, dtype=torch.bool)
    own[:, 1], own[1, 10:] = False, False
    monitor = EntropyMonitor(model, "layer", dtype=torch.float64)
    monitor.start(attention_mask=own)
    output = model(x, **MARKS["position ids"])
    monitor.stop()
    kept = [row[m] for row, m in zip(documents(output), documents(own), strict=True)]
    assert monitor.compute()["matrix_entropy/layer"] == pytest.approx(slow_pooled_entropy(kept), abs=1e-9)


SEVERAL: dict[str, Tensor] = {
    # Text, an image of 2 x 3, text.
    "image": torch.tensor(
        [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]
    ),
    "image first": torch.tensor([[0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]]),
    # Two frames of 2 x 2, 50 apart, and text that goes on from the larger side.
    "video": torch.tensor(
        [[0, 1, 1, 1, 1, 51, 51, 51, 51, 3], [0, 1, 1, 2, 2, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 1, 2, 1, 2, 3]]
    ),
}


@pytest.mark.parametrize("kind", list(SEVERAL))
def test_images_begin_no_document(kind):
    one = SEVERAL[kind].unsqueeze(1)
    assert find_packing({"position_ids": one}) is None
    found = find_packing({"position_ids": torch.cat([one, one, one], dim=2)})
    assert found is not None
    assert found.tokens[:, 0].tolist() == [0, one.shape[2], 2 * one.shape[2]]


@pytest.mark.parametrize(
    "mask",
    [
        (torch.arange(SIZE) < torch.tensor([[12], [7]])).long(),
        (torch.arange(SIZE) >= torch.tensor([[0], [5]])).long(),
        torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool).tril(),
        (torch.arange(SIZE) >= torch.tensor([[0], [5]]))[:, None, None] & torch.ones(SIZE, SIZE).bool().tril(),
        torch.rand(2, SIZE),
    ],
)
def test_padding_is_no_packing(mask):
    found = mask.cumsum(-1).clamp(min=1) - 1 if mask.ndim == 2 else torch.arange(SIZE).expand(2, -1)
    marks = {"attention_mask": mask.bool() if mask.is_floating_point() else mask}
    assert find_packing(marks, numbered=True) is None
    assert find_packing({**marks, "position_ids": found.long()}) is None or mask.is_floating_point()


def test_positions_that_are_all_zero_tell_nothing():
    assert find_packing({"position_ids": torch.zeros(2, SIZE, dtype=torch.long)}) is None


@needs("transformers", "5.0")  # before, experts are called one by one
@pytest.mark.parametrize("marks", [{}, {"attention_mask": PADDING}, MARKS["position ids"]])
def test_experts_get_all_tokens_in_one_row_which_are_split_again(marks):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    block = next(name for name, module in model.named_modules() if type(module).__name__ == "MixtralDecoderLayer")
    (part,) = (
        name for name in dict(model.get_submodule(block).named_children()) if name in ("mlp", "block_sparse_moe")
    )
    monitor = EntropyMonitor(model, f"{block}.{part}*", metrics="sequence_matrix_entropy")
    with monitor, torch.no_grad():
        model(torch.randint(64, (2, SIZE)), **marks)
    of_tokens = [value for key, value in monitor.compute().items() if key.endswith((part, ".experts"))]
    assert of_tokens == pytest.approx(of_tokens[:1] * len(of_tokens), abs=1e-5)


def qwen() -> Any:
    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("axes", [3, 4])
def test_packed_rows_of_a_vision_language_model(axes):
    model = qwen()
    ids = torch.randint(3, 64, (1, SIZE))
    packed = positions()[:1].expand(axes, -1, -1)
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    with monitor, torch.no_grad():
        states = model(input_ids=ids, position_ids=packed, output_hidden_states=True, use_cache=False).hidden_states
    found = monitor.compute()
    for layer, own in zip(monitor.layers, states, strict=True):
        expected = slow_pooled_entropy(list(own[0].double().split(LENGTHS[0])))
        assert found[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-6)
