"""A run of SmolLM2-135M on one narrow text, with its losses on that text and on news that it does not see."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.smollm2 import load
from matent_callbacks import LoopMonitor

LENGTH, BATCH, HELD_OUT, EVERY = 64, 2, 16, 20
# An eighth of the depth each, and the last hidden state.
LAYERS = (0, 4, 8, 12, 16, 20, 24, 28, "last")
METRICS = (
    "effective_rank",
    "correlation_effective_rank",
    "anisotropy",
    "token_norm",
    "drift",
    "subspace_overlap",
    "token_cosine",
)
LEARNING_RATES = {"full": (1e-6, 1e-5, 1e-4, 1e-3), "LoRA": (1e-5, 1e-4, 1e-3, 1e-2)}


class Texts(NamedTuple):
    """Sequences ``(n, LENGTH)``."""

    train: Tensor
    narrow: Tensor
    general: Tensor


class Setting(NamedTuple):
    """What one run differs in from the others."""

    method: str
    learning_rate: float
    seed: int


@functools.cache
def pretrained() -> tuple[dict[str, Tensor], Any, Texts]:
    """Return weights and configuration of the model, and the texts as its tokens."""
    model, tokenizer = load()

    def cut(documents: Sequence[str]) -> Tensor:
        ids = [i for text in documents for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)

    # The narrow text is the language reference of CPython. The other one, 300 news reports, comes with gensim.
    narrow = cut([topics[name] for name in sorted(topics)])
    general = cut(_news().splitlines())
    apart = torch.arange(len(narrow)) % 10 == 0
    return (
        model.state_dict(),
        model.config,
        Texts(narrow[~apart], _spread(narrow[apart], HELD_OUT), _spread(general, HELD_OUT)),
    )


def _news() -> str:
    spec = find_spec("gensim")
    if spec is None or spec.origin is None:
        raise ImportError("The Lee corpus is missing: pip install --no-deps gensim")
    return (Path(spec.origin).parent / "test" / "test_data" / "lee_background.cor").read_text(encoding="utf-8")


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def finetune(setting: Setting, *, steps: int) -> dict[str, Any]:
    """Train one run, and return what is known of it at a tenth, and what became of it.

    Both losses are in nats per token, every 20 steps and at a tenth. Layers are measured on eight of the held-out
    sequences of each text, at a tenth.
    """
    state, config, texts = pretrained()
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
    model = _model(setting.method, state, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, fused=True)
    tenth, warm_up = max(steps // 10, 1), max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    measured: dict[int, dict[str, float]] = {}
    losses: list[float] = []
    norms: list[float] = []
    held_out = {0: _held_out(model, texts)}
    probe = {
        name: {"input_ids": rows[:8], "attention_mask": torch.ones_like(rows[:8])}
        for name, rows in (("narrow", texts.narrow), ("general", texts.general))
    }
    order = random.Random(setting.seed)
    with LoopMonitor(
        model,
        tenth,
        layers=LAYERS,
        metrics=METRICS,
        probe=probe,
        reference="start",
        pictures=False,
        on_error="raise",
        log=lambda values, step: measured.setdefault(step, {}).update(values),
    ) as monitor:
        for step in range(1, steps + 1):
            with monitor.step(step, ends=True) if step <= tenth else nullcontext():
                batch = texts.train[order.sample(range(len(texts.train)), BATCH)]
                loss = model.train()(input_ids=batch, labels=batch).loss
                loss.backward()
                norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            if step in (tenth, steps) or step % EVERY == 0:
                held_out[step] = _held_out(model, texts)
    return {
        **setting._asdict(),
        "early": {
            "training_loss": statistics.fmean(losses[:tenth]),
            "gradient_norm": statistics.fmean(norms[:tenth]),
            "narrow_loss": held_out[tenth]["narrow"],
            "general_loss": held_out[tenth]["general"],
            **measured[tenth],
        },
        "held_out": held_out,
        "forgetting": held_out[steps]["general"] - held_out[0]["general"],
        "best_narrow_loss": min(losses["narrow"] for losses in held_out.values()),
    }


def _model(method: str, state: dict[str, Tensor], config: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    if method == "LoRA":
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model


@torch.inference_mode()
def _held_out(model: Any, texts: Texts) -> dict[str, float]:
    return {
        name: statistics.fmean(
            float(model.eval()(input_ids=rows, labels=rows).loss) for rows in torch.split(sequences, 8)
        )
        for name, sequences in (("narrow", texts.narrow), ("general", texts.general))
    }


def settings(seeds: int) -> list[Setting]:
    """Return all runs, the seeds one after the other."""
    return [
        Setting(method, rate, seed)
        for seed, (method, rates) in itertools.product(range(seeds), LEARNING_RATES.items())
        for rate in rates
    ]
