"""Every auto class of the installed transformers, and a small config for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
import transformers.models.auto.modeling_auto as modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

DEPTH, TOWER_DEPTH = 3, 2

# What counts layers, in any config. Towers beside the language model get another number, to be told apart.
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_num_layers", "decoder_num_layers", "layers"),
    *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_layer", "num_blocks", "n_encoder_layers"),
)
_TOWERS = ("vision", "audio", "speech", "visual", "qformer", "image", "vq", "detector", "mask", "prompt", "codec")
_WIDTHS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "dim": 32,
    "emb_dim": 32,
    "hidden_dim": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "rotary_dim": 8,
    "d_kv": 8,
    "d_head": 8,
    "attention_head_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "embedding_size": 16,
    "state_size": 8,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def auto_classes() -> dict[str, str]:
    """Map the name of every model class that an auto class can make to its model type."""
    found: dict[str, str] = {}
    for name in sorted(vars(modeling_auto)):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            for model_type, names in getattr(modeling_auto, name).items():
                for own in names if isinstance(names, tuple) else (names,):
                    found.setdefault(own, model_type)
    return dict(sorted(found.items()))


def auto_names(name: str) -> set[str]:
    """The names of all auto mappings that hold a class."""
    return {
        mapping
        for mapping in vars(modeling_auto)
        if mapping.startswith("MODEL_") and mapping.endswith("MAPPING_NAMES")
        for names in getattr(modeling_auto, mapping).values()
        if name == names or (isinstance(names, tuple) and name in names)
    }


def config_class(model_class: Any, model_type: str) -> Any:
    own = getattr(model_class, "config_class", None)
    return own or getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


def small(config_type: Any, *, widths: bool, default: Any = None, depth: int = DEPTH) -> Any:
    """A config of few layers, and narrow ones with ``widths``; its parts likewise."""
    if default is None:
        default = config_type()
    own: dict[str, Any] = {}
    for name in _DEPTHS:
        if type(getattr(default, name, None)) is int:
            own[name] = depth
    for name, value in _WIDTHS.items() if widths else ():
        before = getattr(default, name, None)
        if name == "pad_token_id" and hasattr(default, name):
            own[name] = value
        if before is not None and isinstance(before, int) == isinstance(value, int):
            own[name] = type(before)(value) if isinstance(value, tuple) else value
        elif type(value) is int and isinstance(before, list | tuple) and name in ("image_size", "patch_size"):
            own[name] = type(before)([value] * len(before))
    for name in getattr(config_type, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            with contextlib.suppress(Exception):
                tower = any(word in name for word in _TOWERS)
                own[name] = small(type(part), widths=widths, depth=TOWER_DEPTH if tower else depth)
    return config_type(**{**own, **OVERRIDES.get(config_type.__name__, {})})


OVERRIDES: dict[str, dict[str, Any]] = {}


def configs(model_class: Any, model_type: str, *, narrow: bool) -> Iterator[Any]:
    """Configs to try, the smallest first."""
    kinds = [config_class(model_class, model_type)]
    with contextlib.suppress(Exception):
        kinds.append(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]))
    for kind in dict.fromkeys(kinds):
        for widths in (True,) if narrow else (True, False, None):
            with contextlib.suppress(Exception):
                yield kind() if widths is None else small(kind, widths=widths)


def build(name: str, model_type: str, *, device: str = "meta", narrow: bool = False) -> Any:
    """The model of a class, from the first config that it can be made of.

    Raises:
        Exception: What the last config failed with.
    """
    model_class = getattr(transformers, name)
    failure: Exception = LookupError(f"no config of {name} can be made")
    for config in configs(model_class, model_type, narrow=narrow):
        try:
            with torch.device(device):
                return model_class(config)
        except Exception as error:
            failure = error
    raise failure
