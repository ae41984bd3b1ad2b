"""The page in a real headless Chromium."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from matent_callbacks.report import Run, page, read_run
from tests.report.conftest import HOSTILE, Logged

BOTH_WIDTHS = pytest.mark.parametrize("width", [390, 1440])
BOTH_SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
# The boxes of all that is drawn in a picture: lines, cells, text.
BOXES = """() => [...document.querySelectorAll('figure svg')].map(svg => {
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
  const lines = [...document.querySelectorAll('svg [id*="line2d"]:not([id^=heatmap]) path')]
    .map(p => getComputedStyle(p)).filter(s => s.stroke !== 'none' && +s.strokeOpacity > .5)
    .map(s => ratio(s.stroke, card));
  return {card, text: Math.min(...text), lines: Math.min(...lines), number: lines.length};
}"""


@functools.cache
def page_of(folder: Path) -> str:
    return page(read_run(folder))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        reason = "needs playwright and a chromium on the PATH"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page from disk; afterwards there must have been no dialog, no error, no request."""
    contexts, troubles = [], list[str]()

    def open_page(html: str, *, width: int = 1440, scheme: str = "light", policy: bool = True) -> Any:
        file = tmp_path / "report.html"
        assert html.count(POLICY) == 1
        file.write_text(html if policy else html.replace(POLICY, ""), encoding="utf-8")
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda r: r.url.startswith("data:") or r.url == file.as_uri() or troubles.append(r.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


@BOTH_WIDTHS
@BOTH_SCHEMES
def test_pictures_are_drawn_and_fit(stopped: Logged, opened: Callable[..., Any], width: int, scheme: str) -> None:
    tab = opened(page_of(stopped.folder), width=width, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == 12
    for box in boxes:
        assert box["width"] > 250
        assert box["height"] > 150
        assert 0 <= box["left"] < box["right"] <= width
        assert box["drawn"] >= 3
        # No label sticks out of its card, none is too small to read.
        assert box["card"]["left"] <= box["left_text"]
        assert box["right_text"] <= box["card"]["right"]
    sizes = tab.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t).fontSize) * t.getCTM().d)"
    )
    assert min(abs(size) for size in sizes if size) >= 9
    contrast = tab.evaluate(CONTRAST)
    assert contrast["text"] >= 7
    assert contrast["lines"] >= 3.5
    assert contrast["number"] > 10
    assert (contrast["card"] == "rgb(255, 255, 255)") == (scheme == "light")
    # Open tables scroll in themselves.
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@BOTH_WIDTHS
def test_other_logs(resumed: Path, stopped: Logged, opened: Callable[..., Any], width: int) -> None:
    for folder, pictures in ((resumed / "csv", 4), (resumed / "tensorboard", 4), (stopped.wandb, 12)):
        tab = opened(page_of(folder), width=width)
        assert len(tab.query_selector_all("figure svg[role=img]")) == pictures
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_told_to_those_who_do_not_see_them(stopped: Logged, opened: Callable[..., Any]) -> None:
    tab = opened(page_of(stopped.folder))
    image = tab.get_by_role("img", name=re.compile("Image-text alignment (?!with exchanged)"))
    assert image.count() == 1
    assert "at step 2 to " in image.locator("desc").text_content()
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    broken = tab.evaluate(
        "[...document.querySelectorAll('svg use')].map(u => u.getAttribute('href'))"
        ".filter(h => !document.getElementById(h.slice(1)))"
    )
    assert broken == []


def test_whatever_a_run_is_called_is_shown_as_text(stopped: Logged, opened: Callable[..., Any]) -> None:
    for folder in (stopped.folder, stopped.wandb):
        # It is the escaping that is tested, so without the policy, which would stop a script that got through.
        tab = opened(page_of(folder), policy=False)
        assert tab.title() == HOSTILE
        assert tab.locator("h1").inner_text() == HOSTILE
        assert tab.locator("main img, script, iframe").count() == 0


def test_whatever_layers_are_called_is_shown_as_text(opened: Callable[..., Any]) -> None:
    layers = [
        "<img src=x onerror=alert(1)>",
        "</text></svg><script>alert(2)</script>",
        r"$\frac{1$ & $x^2$",
        '" onload="alert(3)',
        "{{ 7 * 7 }}{% raw %}",
        "url(#p) id='loss-figure_1'",
        "]]><!--",
    ]
    values = {f"{m}/{n}": 2.0 + i for i, n in enumerate(layers) for m in ("effective_rank", "matrix_entropy")}
    alignment = {f"alignment/{n}": 1.0 for n in layers}
    records = [{"step": s, "loss": 1.0, **values, **alignment, HOSTILE: 1.0, "$x$": 2.0} for s in (1, 2)]
    name = " ".join(layers)
    tab = opened(page(Run(name, name, records, notes=[name])), policy=False)
    assert tab.locator("h1").inner_text() == name
    assert tab.locator("main img, script, iframe").count() == 0
    shown = tab.evaluate("[...document.querySelectorAll('figure svg text')].map(t => t.textContent)")
    # All of them are in the heat map; long ones are shortened in their middle.
    assert {layers[2], layers[3], layers[6]} <= set(shown)
    listed = tab.evaluate("[...document.querySelectorAll('td')].map(t => t.textContent)")
    assert {*(f"effective_rank/{layer}" for layer in layers), HOSTILE, "$x$"} <= set(listed)


def test_long_names_fit(opened: Callable[..., Any]) -> None:
    layers = [f"{'very_long_module_name.' * 5}layers.{i}" for i in range(3)]
    values = {f"effective_rank/{layer}": 2.0 + i for i, layer in enumerate(layers)}
    tab = opened(page(Run("n" * 300, "s" * 300, [{"step": 1, **values}, {"step": 2, **values}])), width=390)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for box in tab.evaluate(BOXES):
        assert box["card"]["left"] <= box["left_text"]
        assert box["right_text"] <= box["card"]["right"]


def test_paper_is_white_and_shows_everything(stopped: Logged, opened: Callable[..., Any]) -> None:
    tab = opened(page_of(stopped.folder), width=900, scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(0, 0, 0)"
    assert len(tab.pdf()) > 20_000


def test_a_run_without_anything_known(opened: Callable[..., Any]) -> None:
    tab = opened(page(Run("a", "b", [{"step": 1, "accuracy": 0.5}])), width=390)
    assert "None of the quantities that this report knows is in the log." in tab.locator("main").inner_text()
    assert tab.locator("svg").count() == 0
