"""A measurement of image-text alignment over plain forwards of its probe.

What `AlignmentCallback` does each time by default, on a LLaVA: the image through the vision tower, the language model
on the image alone, on the text alone, on both and on both with the images moved on by one sample, effective ranks, and
two measures of the pairs against 200 random pairings. A plain forward is the model's own, in evaluation mode, with its
loss. *Random pairings* is the share of the measurement that goes into these.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks._markdown import begin, table
from benchmarks._timing import interleaved, ratio
from matent_callbacks import measure_alignment
from matent_callbacks.functional import linear_cka, mutual_knn, pairing_z_score

FORWARDS = 5
VOCABULARY, IMAGE_TOKEN = 4096, 4095
SIDE, PATCH = 112, 14
PATCHES = (SIDE // PATCH) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: shows that it runs")
    quick = parser.parse_args().quick
    begin(f"A measurement of alignment / {FORWARDS} forwards of the probe", __doc__)
    # Width and blocks of the language model, pairs, tokens of text, rounds.
    settings = [(64, 2, 12, 8, 2)] if quick else [(128, 4, 64, 16, 10), (256, 6, 64, 32, 5)]
    print(f"Images of {PATCHES} tokens. Goals: no more than the forwards; random pairings of 64 pairs under 0.05.\n")
    header = [
        "d",
        "pairs",
        "text",
        "a plain forward",
        "measurement / forwards | goal | met",
        "random pairings | goal | met",
    ]
    table(header, [row(*setting) for setting in settings])


def row(width: int, blocks: int, pairs: int, length: int, rounds: int) -> list[str]:
    """One model and probe."""
    model, probe = make_llava(width, blocks), make_probe(pairs, length)
    image, text = torch.randn(2, pairs, width, generator=torch.Generator().manual_seed(0))
    seconds = interleaved(
        {
            "forwards": functools.partial(plain_forwards, model, probe),
            "measurement": functools.partial(measure_alignment, model, probe),
            "pairings": lambda: [pairing_z_score(measure, image, text) for measure in (linear_cka, mutual_knn)],
        },
        rounds=rounds,
    )
    whole, share = (
        ratio(seconds[part], seconds[of]) for part, of in (("measurement", "forwards"), ("pairings", "measurement"))
    )
    forward = statistics.median(seconds["forwards"]) / FORWARDS
    return [
        f"{width}, {blocks} blocks",
        str(pairs),
        f"{length} tokens",
        f"{forward:.3f} s",
        whole.judged(1),
        share.judged(0.05),
    ]


@torch.no_grad()
def plain_forwards(model: Any, probe: dict[str, Tensor]) -> None:
    for _ in range(FORWARDS):
        model(**probe)


def make_llava(width: int, blocks: int) -> Any:
    """A CLIP tower of half the width and blocks, and a Llama with 64 numbers a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
    text = transformers.LlamaConfig(
        **sizes, vocab_size=VOCABULARY, num_hidden_layers=blocks, max_position_embeddings=512
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=2 * width,
        num_hidden_layers=blocks // 2 + 1,
        num_attention_heads=max(1, width // 128),
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).eval()


def make_probe(pairs: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, IMAGE_TOKEN, (pairs, length), generator=generator)
    images = torch.full((pairs, PATCHES), IMAGE_TOKEN)
    ids = torch.cat([images, text], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full_like(images, -100), text], dim=1),
        "pixel_values": torch.randn(pairs, 3, SIDE, SIDE, generator=generator),
    }


if __name__ == "__main__":
    main()
