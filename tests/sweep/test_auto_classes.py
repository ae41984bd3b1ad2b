"""Every model class that transformers can make: its blocks are found, and read as its own hidden states.

What is refused, or differs, is in a table with the reason: anything else fails, also in a version to come.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from matent_callbacks.capture.stack import Stack, find_stack, is_hugging_face
from tests.sweep.run_small import compare
from tests.sweep.small_configs import auto_classes, build
from tests.versions import needs, older

# Names of classes, from their beginning: why no stack is found.
REFUSED = {
    "Bit|DINOv3ConvNext|EfficientNet|HGNetV2|MobileNetV|PoolFormer|RegNet|ResNet|RTDetrResNet|SuperPoint|TextNet"
    "|Dac|Encodec|UnivNet|UVDoc|UperNet|PPLCNet|PPOCR|SLANet|GlmImageVQVAE|VibeVoiceAcousticTokenizer|WavTokenizer"
    "|Swin2SR|Perceiver|VitMatte|Xcodec|Vits|HiggsAudio": "convolutions, or lists that the config does not count",
    "SqueezeBert": "its blocks are convolutions, and give (B, d, T)",
    "Bark|Blip2ForImageTextRetrieval|Blt|DepthPro|Sam3(Video|LiteText)?Model": "several, none the main one",
}
# Whose blocks are not what the config counts.
UNCOUNTED = {
    "Albert": "one block for all layers",
    "ConvNext|MobileViT|SwiftFormer|Segformer|Pvt|Hiera|Cvt|Levit|FocalNet|GLPN": "stages, whose widths differ",
    "Inkling2Loop": "blocks that run several times are of a class of their own",
    "LongcatFlash": "the config counts each block twice",
    "Nemotron(H|3_5Transcribe)": "the config holds a pattern in place of a number",
    "SuperGlue": "the config holds the kinds of layers",
}
# Whose own hidden states are others than those that are read: which are found among theirs (=) and which not (x).
DIFFERENT = {
    "Albert": ("==", "one block: what goes into it first, and what the model gives"),
    "Aimv2|CLIPText|DeiT|Dinov2|DINOv3ViT|DPT|Eomt|IJepa|Idefics3Vision|Pixio|Sapiens2|Siglip|SmolVLMVision|Tipsv2|ViT"
    "|Yolos|SEW|Wav2Vec2Conformer": ("=+x", "`hidden_states` end before the final norm, `last` is after it"),
    "Mamba|FalconMamba|Rwkv": ("x=+", "`hidden_states` leave out the embeddings"),
    "CpmAnt": ("x+=", "`hidden_states` leave out the prompt in front of the text"),
    "Hrm|Dory": ("=+", "its blocks run several times in a forward, of which the last counts"),
    "Canine": ("=+x", "`hidden_states` hold characters and groups of them; ours are the groups"),
    "Musicgen": ("x+", "its codebooks are one row, so the mask of the test does not fit"),
    "T5Gemma2?For": ("x+", "`hidden_states` of these are those of the decoder"),
    "Sam3LiteTextText": ("[=x]+=", "`hidden_states` hold only the attention blocks"),
}

# The same of transformers before 5.
if older("transformers", "5.0"):
    REFUSED |= {
        "GroupViT": "lists of tokens and groups in turn",
        "Van": "convolutions",
        "BlipForQuestionAnswering|Clvp": "several, none the main one",
    }
    UNCOUNTED |= {"Jukebox": "three stacks of its own"}
    DIFFERENT |= {
        "BioGpt|ModernBert|RobertaPreLayerNorm": ("=+x", "`hidden_states` end before the final norm"),
        "GPTSanJapanese": ("x=+x+=", "its switch layers are left out without labels of their own"),
    }


def reason(table: dict[str, Any], name: str) -> Any:
    return next((why for pattern, why in table.items() if re.match(rf"(?:{pattern})", name)), None)


def is_named(name: str, found: str) -> bool:
    """Whether a difference is the one that the table has for a class."""
    expected = reason(DIFFERENT, name)
    return expected is not None and re.search(rf", {expected[0]}( last)?$", found) is not None


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_default_log_level", 50)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def counts(config: Any) -> set[int]:
    """Every number of layers that a config or one of its parts holds."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found |= counts(value)
        elif re.search("layer|depth|block", name):
            found |= {value} if isinstance(value, int) else set()
            if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
                found |= {len(value), sum(value)}
    return found


def faults(model: Any, stack: Stack) -> list[str]:
    """What is wrong with the stack that was found."""
    names = {module: name for name, module in model.named_modules()}
    kinds = {type(block).__name__ for block in stack.blocks}
    found = []
    if len(stack.blocks) not in counts(model.config):
        found.append(f"{len(stack.blocks)} blocks")
    if any(re.search("(Attention|MLP|FeedForward|Conv|Embeddings)$", kind) for kind in kinds):
        found.append(f"blocks are {', '.join(kinds)}")
    if len({kind.replace("Attention", "").replace("Mamba", "") for kind in kinds}) > 2:
        found.append(f"several kinds, {', '.join(kinds)}")
    if re.search("For[A-Z]|LMHead", type(stack.last).__name__) or stack.last is model.get_output_embeddings():
        found.append(f"last is {type(stack.last).__name__}")
    if is_hugging_face(stack.last) and not any(names[block].startswith(names[stack.last]) for block in stack.blocks):
        found.append(f"last is {names[stack.last]}, beside the blocks")
    return found


class Built(NamedTuple):
    """What was found in a model that was built without memory for its weights."""

    faults: list[str] | ValueError
    kinds: tuple[type, ...] = ()
    """Of the modules that are read."""
    size: int = 0


@pytest.fixture(scope="module")
def built() -> dict[str, Built | None]:
    """By class; None where no config makes one."""
    found: dict[str, Built | None] = {}
    for name, model_type in auto_classes().items():
        found[name] = model = None
        for narrow in (True, False):
            with suppress(Exception):
                model = model or build(name, model_type, narrow=narrow)
        if model is not None:
            try:
                stack = find_stack(model)
            except ValueError as error:
                found[name] = Built(error)
                continue
            kinds = type(stack.owner), type(stack.last), *map(type, stack.blocks)
            found[name] = Built(faults(model, stack), kinds, sum(p.numel() for p in model.parameters()))
    return found


def test_the_blocks_of_every_class_are_found(built):
    right, refused, unbuilt, wrong = [], [], [], []
    for name, model in built.items():
        if model is None:
            unbuilt.append(name)
        elif isinstance(error := model.faults, ValueError):
            clear = re.search(r"`module`|`layers`", str(error)) and reason(REFUSED, name)
            (refused if clear else wrong).append(name if clear else f"{name}: {error}")
        else:
            found = [] if reason(UNCOUNTED, name) else model.faults
            (wrong if found else right).append(f"{name}: {'; '.join(found)}" if found else name)
    print(f"{len(right)} right, {len(refused)} refused, {len(unbuilt)} not built")
    assert not wrong, "\n".join(wrong)
    assert len(right) > (600 if older("transformers", "5.20") else 1300)


def test_what_is_read_are_the_hidden_states_that_a_model_returns(built):
    same, named, failed, wrong, shared = [], [], [], [], []
    compared: set[tuple[type, ...]] = set()
    for name, model_type in auto_classes().items():
        model = built[name]
        if model is not None and model.kinds in compared:
            shared.append(name)  # another head around the same transformer: the same modules are read
            continue
        try:
            small_enough = model is not None and model.size < 8e6
            found = compare(build(name, model_type, device="cpu", narrow=True), name) if small_enough else "too large"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if model is not None and found == "same":
            same.append(name)
            compared.add(model.kinds)
        elif " read, " in found:
            (named if is_named(name, found) else wrong).append(f"{name}: {found}")
        else:
            failed.append(name)
    print(f"{len(same)} the same, {len(shared)} of their kinds, {len(named)} named as different, {len(failed)} not run")
    assert not wrong, "\n".join(wrong)
    assert len(same) > (100 if older("transformers", "5.20") else 200)


def small(name: str) -> Any:
    model_type = auto_classes().get(name)
    if model_type is None:
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    return build(name, model_type, device="cpu", narrow=True)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("ModernBertForMaskedLM", "ModernBertModel"),
        ("ViTForMaskedImageModeling", "ViTModel"),
        ("Llama4ForCausalLM", "Llama4TextModel"),
        pytest.param("MllamaForCausalLM", "MllamaTextModel", marks=needs("transformers", "5.0")),
        ("FSMTForConditionalGeneration", "FSMTEncoder"),
        ("XLMModel", "XLMModel"),
        ("FlaubertWithLMHeadModel", "FlaubertModel"),
    ],
)
def test_last_is_no_head(name, last):
    model = small(name)
    assert type(find_stack(model).last).__name__ == last
    found = compare(model, name)
    assert found == "same" or is_named(name, found)


def test_blocks_that_are_no_modules_are_refused():
    model = small("FlaubertModel")
    model.config.pre_norm = True
    with pytest.raises(ValueError, match=r"separate lists .*attentions, layer_norm1, ffns, layer_norm2.*`module`"):
        find_stack(model)


@needs("transformers", "5.0")
def test_several_transformers_are_named():
    model = small("Blip2ForImageTextRetrieval")
    with pytest.raises(ValueError, match=r"`module` must say .*: vision_model, qformer"):
        find_stack(model)


def test_a_head_of_an_own_model_is_left_out():
    """A subclass with its own head, which gives logits under any name."""

    class Mine(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            block = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
            self.embed, self.blocks = nn.Embedding(9, 8), nn.ModuleList(block)
            self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 9)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.blocks[1](self.blocks[0](self.embed(input_ids)))))

    model = Mine(transformers.LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
    assert find_stack(model).last is model.norm
