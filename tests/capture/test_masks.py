"""Padding is what any module around a layer is told: masks made inside of models, torch's own, and masks of pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    HubertConfig,
    HubertModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Speech2TextConfig,
    Speech2TextModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from matent_callbacks import EntropyMonitor
from tests.conftest import VOCABULARY, slow_pooled_entropy
from tests.versions import needs

SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
SAMPLES = [800, 500, 623]
LAYERS = ("layer_00", "layer_01", "last")


def lengths_as_mask(lengths: list[int], total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(lengths).unsqueeze(1)


def frames(samples: int) -> int:
    """Of two convolutions without padding."""
    for kernel, stride in zip(SPEECH["conv_kernel"], SPEECH["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def hidden_states_of(output: Any) -> tuple[Tensor, ...]:
    """``last`` is after the final norm, which the last of ``hidden_states`` of some speech encoders is not."""
    last = output.get("last_hidden_state")
    return output.hidden_states if last is None else (*output.hidden_states[:-1], last)


def read(monitor: EntropyMonitor, run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    with monitor, torch.no_grad():
        output = run()
    return monitor.compute(), output


def assert_reads(readings: dict[str, float], hidden_states: Any, mask: Tensor | None, layers: Any = LAYERS) -> None:
    assert len(hidden_states) == len(layers)
    for layer, hidden in zip(layers, hidden_states, strict=True):
        expected = slow_pooled_entropy(hidden, mask)
        assert readings[f"matrix_entropy/{layer}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model_class", "config_class", "settings"),
    [
        (Wav2Vec2Model, Wav2Vec2Config, {}),
        (Wav2Vec2Model, Wav2Vec2Config, {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
        (Wav2Vec2ForCTC, Wav2Vec2Config, {}),
        (HubertModel, HubertConfig, {}),
        (WavLMModel, WavLMConfig, {}),
    ],
)
def test_frames_of_speech_encoders(model_class, config_class, settings, attention):
    torch.manual_seed(0)
    if model_class is WavLMModel:
        attention = "eager"
    model = model_class(config_class(**SPEECH, **settings, attn_implementation=attention)).eval()
    mask = lengths_as_mask(SAMPLES, max(SAMPLES)).long()
    sound = torch.randn(mask.shape) * mask
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    readings, output = read(monitor, lambda: model(sound, attention_mask=mask, output_hidden_states=True))
    own = lengths_as_mask([frames(length) for length in SAMPLES], output.hidden_states[0].shape[1])
    assert not own.all()
    assert_reads(readings, hidden_states_of(output), own)

    # A layer by name, and the same batch without padding.
    name = next(n for n, _ in model.named_modules() if n.endswith("layers.0.feed_forward"))
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    monitor = EntropyMonitor(model, name, dtype=torch.float64)
    readings, _ = read(monitor, lambda: model(sound, attention_mask=mask))
    assert_reads(readings, seen, own, [name])
    handle.remove()
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    everything = torch.ones_like(mask)
    readings, output = read(monitor, lambda: model(sound, attention_mask=everything, output_hidden_states=True))
    assert_reads(readings, hidden_states_of(output), None)


def test_more_convolutions_than_blocks_are_no_stack():
    torch.manual_seed(0)
    five = {"conv_dim": (16,) * 5, "conv_stride": (5, 2, 2, 1, 1), "conv_kernel": (10, 3, 3, 2, 2)}
    model = Wav2Vec2Model(Wav2Vec2Config(**{**SPEECH, **five}))
    assert EntropyMonitor(model, "all").layers == LAYERS


def test_a_mask_of_pairs_is_all_that_the_blocks_are_handed():
    """The encoder makes the mask of its frames inside, and hands its blocks one of pairs, or none without padding."""
    torch.manual_seed(0)
    config = Speech2TextConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        input_feat_per_channel=8,
        conv_channels=16,
    )
    model = Speech2TextModel(config).eval()
    for lengths in ([60, 37, 51], [60, 60, 60]):
        mask = lengths_as_mask(lengths, 60).long()
        inputs = {"input_features": torch.randn(3, 60, 8), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)}
        monitor = EntropyMonitor(model, "all", dtype=torch.float64)
        readings, output = read(monitor, lambda: model(**inputs, attention_mask=mask, output_hidden_states=True))  # noqa: B023
        halved = [((length - 1) // 2 + 1 - 1) // 2 + 1 for length in lengths]
        assert_reads(readings, output.encoder_hidden_states, lengths_as_mask(halved, 15))


def whisper() -> Any:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


def test_whisper_sees_silence_as_sound_and_pads_its_decoder():
    model = whisper()
    sound = torch.randn(3, 8, 40)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    decoder_mask = lengths_as_mask([9, 4, 6], 9).long()
    inputs = {"input_features": sound, "decoder_input_ids": ids, "decoder_attention_mask": decoder_mask}
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    readings, output = read(monitor, lambda: model(**inputs, output_hidden_states=True))
    assert_reads(readings, output.encoder_hidden_states, None)
    monitor = EntropyMonitor(model, "all", module="model.decoder", dtype=torch.float64)
    readings, output = read(monitor, lambda: model(**inputs, output_hidden_states=True, use_cache=False))
    assert_reads(readings, output.decoder_hidden_states, decoder_mask)

    # A mask of the features, which the model uses for masking in training only: it attends to every frame.
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    mask = lengths_as_mask([40, 22, 31], 40).long()
    with pytest.warns(UserWarning, match="counted in layer_00, layer_01, last: .* has length 40, .* have 20, ") as told:
        readings, output = read(monitor, lambda: model(**inputs, attention_mask=mask, output_hidden_states=True))
    assert len(told) == 1
    assert "`attention_mask=` of EntropyMonitor.start, or `mask=` of the callback" in str(told[0].message)
    assert_reads(readings, output.encoder_hidden_states, None)
    own = lengths_as_mask([20, 11, 16], 20)
    monitor.start(attention_mask=own)
    with torch.no_grad():
        model(**inputs, attention_mask=mask)
    monitor.stop()
    assert_reads(monitor.compute(), output.encoder_hidden_states, own)


AUDIO, TEXT_PADDING = 9, 0


def qwen2_audio(attention: str) -> Any:
    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            max_source_positions=20,
            attn_implementation=attention,
        ),
        text_config=Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=TEXT_PADDING,
        ),
        audio_token_index=AUDIO,
    )
    return Qwen2AudioForConditionalGeneration(config).eval()


def sound_and_text(*, merged: bool) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Three samples of one sound and a text each; with how long each is, in frames and in tokens.

    ``merged``: the text has one token for the whole sound, in whose place the model puts as many as it has.
    """
    mel = [40, 22, 31]
    in_blocks = [(length - 1) // 2 + 1 for length in mel]
    tokens = [(length - 2) // 2 + 1 for length in in_blocks]
    texts = [[11, 12], [21, 22, 23, 24, 25], [31]]
    rows = [[5] + [AUDIO] * (1 if merged else n) + text for n, text in zip(tokens, texts, strict=True)]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [TEXT_PADDING] * (longest - len(row)) for row in rows]),
        "attention_mask": lengths_as_mask([len(row) for row in rows], longest).long(),
        "input_features": torch.randn(3, 8, 40),
        "feature_attention_mask": lengths_as_mask(mel, 40).long(),
    }
    return batch, in_blocks, [1 + n + len(text) for n, text in zip(tokens, texts, strict=True)]


@pytest.mark.parametrize("merged", [True, False])
def test_the_language_model_of_an_audio_model(merged):
    model = qwen2_audio("sdpa")
    batch, _, lengths = sound_and_text(merged=merged)
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    readings, output = read(monitor, lambda: model(**batch, output_hidden_states=True, use_cache=False))
    assert_reads(readings, output.hidden_states, lengths_as_mask(lengths, output.hidden_states[0].shape[1]))


@needs("transformers", "5.0")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_audio_tower_of_an_audio_model(attention):
    model = qwen2_audio(attention)
    batch, lengths, _ = sound_and_text(merged=False)
    tower = model.model.audio_tower
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in tower.layers]
    handles.append(tower.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    monitor = EntropyMonitor(model, "all", module="model.audio_tower", dtype=torch.float64)
    # Behind the blocks two frames become one, and nothing is handed a mask of those.
    with pytest.warns(UserWarning, match="Padding is counted in last: .* has length 20, .* have 10, ") as told:
        readings, _ = read(monitor, lambda: model(**batch))
    assert len(told) == 1
    assert_reads(readings, seen[:2], lengths_as_mask(lengths, 20), LAYERS[:2])
    names = ["model.audio_tower.layers.0", "model.audio_tower.layers.1.fc2"]
    monitor = EntropyMonitor(model, names, dtype=torch.float64)
    handles.append(tower.layers[1].fc2.register_forward_hook(lambda module, args, output: seen.append(output)))
    seen.clear()
    readings, _ = read(monitor, lambda: model(**batch))
    assert_reads(readings, [seen[1], seen[2]], lengths_as_mask(lengths, 20), names)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.linear(x)


class Makes(nn.Module):
    """Hands its blocks a mask that it makes itself, perhaps of tokens that it has made one of two."""

    def __init__(self, make: Callable[[Tensor], Tensor | None], *, halves: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.make = make
        self.halves = halves

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"][:, ::2] if self.halves else batch["x"]
        for block in self.blocks:
            x = block(x, attention_mask=self.make(batch["lengths"]))
        return x


def added(sees: Tensor) -> Tensor:
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


def pairs(lengths: Tensor, rule: Callable[[Tensor], Tensor], *, left: bool = False) -> Tensor:
    """``(B, 1, T, T)``: which of the valid keys each query sees."""
    tokens = torch.arange(8) < lengths.unsqueeze(1)
    tokens = tokens.flip(1) if left else tokens
    return tokens[:, None, None] & rule(torch.ones(8, 8, dtype=torch.bool))


def window(sees: Tensor) -> Tensor:
    return sees.tril() & sees.triu(-2)


RULES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "all": lambda n: pairs(n, lambda sees: sees),
    "all, added": lambda n: added(pairs(n, lambda sees: sees)),
    "all, one row": lambda n: pairs(n, lambda sees: sees)[:, :, :1],
    "all, of valid queries": lambda n: pairs(n, lambda s: s) & pairs(n, lambda s: s).transpose(2, 3),
    "all, four heads": lambda n: pairs(n, lambda sees: sees).expand(-1, 4, -1, -1),
    "all, no heads": lambda n: pairs(n, lambda sees: sees)[:, 0],
    "before": lambda n: pairs(n, torch.tril),
    "before, added": lambda n: added(pairs(n, torch.tril)),
    "before, left": lambda n: pairs(n, torch.tril, left=True),
    "flat": lambda n: torch.arange(8) < n.unsqueeze(1),
    "flat, numbers": lambda n: (torch.arange(8) < n.unsqueeze(1)).double(),
    "flat, added": lambda n: added(torch.arange(8) < n.unsqueeze(1)),
}
# As of MPT, where true hides a key; and of Longformer, which adds large numbers for tokens that attend to all.
RULES["before, hidden"] = lambda n: ~pairs(n, torch.tril)
RULES["flat, added, some global"] = lambda n: added(torch.arange(8) < n.unsqueeze(1)) + 1e4 * (torch.arange(8) == 0)
TELL_NOTHING: dict[str, Callable[[Tensor], Tensor | None]] = {
    "window": lambda n: pairs(n, window),
    "rows of padding that see all": lambda n: (
        pairs(n, torch.tril, left=True) | ~pairs(n, lambda s: s, left=True).transpose(2, 3)
    ),
}
BATCH = {"x": torch.randn(3, 8, 16, dtype=torch.float64), "lengths": torch.tensor([8, 5, 3])}


@pytest.mark.parametrize("rule", list(RULES))
def test_what_a_mask_tells(rule):
    torch.manual_seed(0)
    model = Makes(RULES[rule])
    monitor = EntropyMonitor(model, dtype=torch.float64)
    readings, output = read(monitor, lambda: model(BATCH))
    tokens = torch.arange(8) < BATCH["lengths"].unsqueeze(1)
    assert_reads(readings, [output], tokens.flip(1) if "left" in rule else tokens, ["last"])
    # No padding at all.
    batch = {**BATCH, "lengths": torch.tensor([8, 8, 8])}
    readings, output = read(monitor, lambda: model(batch))
    assert_reads(readings, [output], None, ["last"])


@pytest.mark.parametrize("rule", ["window", "all", "flat"])
def test_what_a_mask_does_not_tell_is_warned_of_once(rule):
    torch.manual_seed(0)
    model = Makes({**RULES, **TELL_NOTHING}[rule], halves=rule != "window")
    monitor = EntropyMonitor(model, "all", dtype=torch.float64)
    length = 8 if rule == "window" else 4
    with pytest.warns(UserWarning, match=f"in layer_00, layer_01, last: .* length 8, .* have {length}, ") as told:
        readings, output = read(monitor, lambda: model(BATCH))
    assert len(told) == 1
    assert_reads(readings, [output], None, ["last"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(monitor, lambda: model(BATCH))
        # Nor of a mask without padding.
        whole = {**BATCH, "lengths": torch.tensor([8, 8, 8])}
        read(EntropyMonitor(model, "all"), lambda: model(whole))


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("add", [False, True])
def test_a_causal_mask_without_batch_is_no_padding(size, add, recwarn):
    torch.manual_seed(0)
    sees = torch.ones(8, 8, dtype=torch.bool).tril()
    model = Makes(lambda n: added(sees) if add else sees)
    batch = {"x": torch.randn(size, 8, 16, dtype=torch.float64), "lengths": torch.full((size,), 8)}
    readings, output = read(EntropyMonitor(model, dtype=torch.float64), lambda: model(batch))
    assert_reads(readings, [output], None, ["last"])
    assert not recwarn.list


def test_a_mask_that_tells_nothing_is_not_taken():
    """Left padding that sees everything, lest a row be empty: the diagonal is no padding mask then."""
    torch.manual_seed(0)
    model = Makes(TELL_NOTHING["rows of padding that see all"])
    readings, output = read(EntropyMonitor(model, dtype=torch.float64), lambda: model(BATCH))
    assert_reads(readings, [output], None, ["last"])


@needs("transformers", "5.0")
def test_the_mask_of_one_tower_is_not_that_of_another(recwarn):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    model = CLIPModel(config).eval()
    for length in (12, 17):  # 16 patches and a class token
        mask = lengths_as_mask([length, 4, 7], length).long()
        inputs = {"input_ids": torch.randint(2, VOCABULARY, mask.shape), "attention_mask": mask}
        inputs["pixel_values"] = torch.randn(3, 3, 32, 32)
        monitor = EntropyMonitor(model, "all", module="vision_model", dtype=torch.float64)
        with torch.no_grad():
            own = model.vision_model(inputs["pixel_values"], output_hidden_states=True)
        readings, _ = read(monitor, lambda: model(**inputs))  # noqa: B023
        assert_reads(readings, (*own.hidden_states[:-1], own.last_hidden_state), None)
        monitor = EntropyMonitor(model, "all", module="text_model", dtype=torch.float64)
        with torch.no_grad():
            own = model.text_model(inputs["input_ids"], mask, output_hidden_states=True)
        readings, _ = read(monitor, lambda: model(**inputs))  # noqa: B023
        assert_reads(readings, (*own.hidden_states[:-1], own.last_hidden_state), mask)
    assert not [w for w in recwarn if "Padding" in str(w.message)]


def test_what_is_no_token_has_no_padding(recwarn):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    mask = lengths_as_mask([9, 4, 7, 5], 9).long()
    monitor = EntropyMonitor(model, "pooler", metrics="rankme", dtype=torch.float64)
    readings, output = read(monitor, lambda: model(torch.randint(2, VOCABULARY, mask.shape), mask))
    values = torch.linalg.svdvals(output.pooler_output.double())
    shares = values / values.sum()
    assert readings["rankme/pooler"] == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-6)
    assert not [w for w in recwarn if "Padding" in str(w.message)]


@pytest.mark.parametrize("shape", [(3, 3), (3, 10), (2, 8), (10,)])
def test_a_mask_of_the_user_that_cannot_fit_is_an_error_that_names_it(shape):
    model = Makes(lambda lengths: None)
    monitor = EntropyMonitor(model)
    monitor.start(attention_mask=torch.ones(shape))
    with pytest.raises(RuntimeError, match=r"`mask` .* \(3, 8\), got \("):
        model(BATCH)
    monitor.stop()


def test_a_flat_mask_that_a_model_is_given_is_multiplied_with():
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16, dtype=torch.float64)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.linear(x)

    model = Given()
    monitor = EntropyMonitor(model, "linear")
    tokens = torch.arange(8) < BATCH["lengths"].unsqueeze(1)
    whole = {"none": torch.zeros(3, 8), "some": tokens.float(), "added": added(tokens), "ints": ~tokens * -10_000}
    for name, mask in whole.items():
        with monitor:
            model(BATCH["x"], mask)
        count = monitor._recording.accumulators["linear"].tokens["pooled"].moments().num_tokens
        assert count == (0 if name == "none" else tokens.sum())
        monitor.reset()
