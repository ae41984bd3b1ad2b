"""What the tests of the pages look for in a browser."""

from __future__ import annotations

from typing import Any

import pytest

BOTH_WIDTHS = pytest.mark.parametrize("width", [390, 1440])
BOTH_SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
# The boxes of all that is drawn in a picture: lines, cells, text. Of the heat map one of two is shown.
BOXES = """() => [...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility()).map(svg => {
  const box = svg.getBoundingClientRect();
  const text = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
  const drawn = [...svg.querySelectorAll('path, image')].filter(p => p.getBoundingClientRect().width > 20);
  return {left: box.left, right: box.right, width: box.width, height: box.height, drawn: drawn.length,
          left_text: Math.min(...text.map(b => b.left)), right_text: Math.max(...text.map(b => b.right)),
          card: svg.parentElement.getBoundingClientRect()};
})"""
CONTRAST = """() => {
  const lab = c => { const d = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    d.fillStyle = c; d.fillRect(0, 0, 1, 1); return [...d.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = c => { const [r, g, b] = lab(c).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const card = getComputedStyle(document.querySelector('figure')).backgroundColor;
  const text = [...document.querySelectorAll('svg text')].map(t => ratio(getComputedStyle(t).fill, card));
  const lines = [...document.querySelectorAll('svg [id*="line2d"]:not([id^=heatmap], [id^=change]) path')]
    .map(p => getComputedStyle(p)).filter(s => s.stroke !== 'none' && +s.strokeOpacity > .5)
    .map(s => ratio(s.stroke, card));
  return {card, text: Math.min(...text), lines: Math.min(...lines), number: lines.length};
}"""


def assert_fits(box: dict[str, Any], width: int) -> None:
    """One of :data:`BOXES` is large enough and on the page, and no label sticks out of its card."""
    assert box["width"] > 250
    assert box["height"] > 150
    assert 0 <= box["left"] < box["right"] <= width
    assert box["card"]["left"] <= box["left_text"]
    assert box["right_text"] <= box["card"]["right"]
