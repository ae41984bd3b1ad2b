"""Small models of three kinds with a tokenizer of their own, saved as a user would have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from matent_callbacks.cli._app import run

WIDTH = 32


def documents(count: int) -> list[str]:
    """Paragraphs of the English text that ships with CPython, one line each."""
    paragraphs = (" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n"))
    return [p[:200] for p in paragraphs if len(p) > 20][:count]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents(400), vocab_size=400, show_progress=False)
    # No padding token, as with GPT-2 and Llama.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)


def save_model(folder: Path, kind: str, *, seed: int = 0, width: int = WIDTH, **saving: Any) -> Path:
    import transformers

    shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(vocab_size=400, max_position_embeddings=128, **shape),
        "bert": lambda: transformers.BertConfig(vocab_size=400, max_position_embeddings=64, **shape),
        "t5": lambda: transformers.T5Config(vocab_size=400, d_model=width, d_ff=64, d_kv=8, num_layers=2, num_heads=4),
    }[kind]()
    heads = {
        "llama": transformers.LlamaForCausalLM,
        "bert": transformers.BertForMaskedLM,
        "t5": transformers.T5ForConditionalGeneration,
    }
    torch.manual_seed(seed)
    model = heads[kind](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # away from what `untrained_like` draws
    model.save_pretrained(folder, **saving)
    save_tokenizer(folder)
    return folder


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def measured(out: Path, *arguments: object, code: int = 0) -> dict[str, Any]:
    """Run ``matent measure`` and read what it wrote."""
    assert run(["measure", *map(str, arguments), "--out", str(out)]) == code
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


def last(content: dict[str, Any], index: int = 0) -> dict[str, Any]:
    quantities: dict[str, Any] = content["models"][index]["layers"]["last"]
    return quantities


def save_adapter(
    folder: Path,
    base: Path,
    *,
    head: str = "AutoModelForCausalLM",
    task: str | None = "CAUSAL_LM",
    vocabulary: int | None = None,
    merge: bool = False,
) -> Path:
    """A LoRA adapter with random weights; with ``merge``, the whole model that it makes of its base, without a head."""
    import peft
    import transformers

    labels = {"num_labels": 5} if task == "SEQ_CLS" else {}
    model = getattr(transformers, head).from_pretrained(base, **labels)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    torch.manual_seed(3)
    modules = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "t5": ["q", "wo"]}[model.config.model_type]
    lora = peft.LoraConfig(r=4, target_modules=modules, task_type=task, init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora)
    (tuned.merge_and_unload().base_model if merge else tuned).save_pretrained(folder)
    return folder
