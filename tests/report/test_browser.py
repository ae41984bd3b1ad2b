"""The page in a real headless Chromium."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matent_callbacks.report import Run, page, read_run
from tests.report.browser import BOTH_SCHEMES, BOTH_WIDTHS, BOXES, CONTRAST, assert_fits
from tests.report.conftest import HOSTILE, Logged


@functools.cache
def page_of(folder: Path) -> str:
    return page(read_run(folder))


@BOTH_WIDTHS
@BOTH_SCHEMES
def test_pictures_are_drawn_and_fit(stopped: Logged, opened: Callable[..., Any], width: int, scheme: str) -> None:
    tab = opened(page_of(stopped.folder), width=width, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == 13
    for box in boxes:
        assert_fits(box, width)
        assert box["drawn"] >= 3
    # No label is too small to read.
    sizes = tab.evaluate(
        """[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())
             .map(t => parseFloat(getComputedStyle(t).fontSize) * t.getCTM().d)"""
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
    for folder, pictures in ((resumed / "csv", 5), (resumed / "tensorboard", 5), (stopped.wandb, 13)):
        tab = opened(page_of(folder), width=width)
        assert len(tab.evaluate(BOXES)) == pictures
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
