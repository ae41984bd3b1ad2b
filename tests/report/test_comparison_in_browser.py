"""Runs side by side, and the marks of a single one, in a real headless Chromium."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from matent_callbacks.report import Run, Stop, comparison, page, read_run
from tests.report.browser import BOTH_SCHEMES, BOTH_WIDTHS, BOXES, CONTRAST, assert_fits
from tests.report.conftest import HOSTILE, Logged


def many_runs(count: int, name: str = "run") -> list[Run]:
    """Runs whose curves lie beside each other, with an alarm and a plateau among them."""
    runs = []
    for i in range(count):
        records: list[dict[str, float]] = [
            {
                "step": s,
                "loss": 2 + i / 4 + 4 / s,
                "eval_loss": 2.5 + i / 4 + 4 / s,
                "alignment/image_text": 0.5 + 0.03 * i,
                **{
                    f"{m}/layer_{n:02d}": (1 + i) * 60 / s + n
                    for n in range(3)
                    for m in ("effective_rank", "matrix_entropy")
                },
                **{f"{m}/last": (1 + i) * 90 / s for m in ("effective_rank", "matrix_entropy")},
            }
            for s in range(1, 60)
        ]
        records[30 + i]["collapse/effective_rank/last"] = 1.0
        settings = {"seed": str(i), "learning_rate": f"{i}e-4", name: name}
        runs.append(Run(f"{name} {i}", "by hand", records, ["The run is over."], Stop(50 + i, "loss", name), settings))
    return runs


@BOTH_WIDTHS
@BOTH_SCHEMES
@pytest.mark.parametrize("count", [2, 12])
def test_runs_side_by_side_fit(opened: Callable[..., Any], width: int, scheme: str, count: int) -> None:
    tab = opened(comparison(many_runs(count)), width=width, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == 6
    for box in boxes:
        assert_fits(box, width)
    contrast = tab.evaluate(CONTRAST)
    assert contrast["text"] >= 7
    assert contrast["lines"] >= 3.5
    # The legend of each picture has each run once, in the look of its line.
    legends = tab.evaluate(
        """[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('.legend span')].map((s, i) => {
             const swatch = getComputedStyle(s.querySelector('i'));
             const line = getComputedStyle(f.querySelector(`[id$="-run${i}"] path`));
             return [s.textContent.trim(), swatch.borderTopColor === line.stroke,
                     (swatch.borderTopStyle === 'dashed') === (line.strokeDasharray !== 'none'),
                     swatch.borderTopColor + swatch.borderTopStyle];
           }))"""
    )
    for legend in legends:
        assert [name for name, *_ in legend] == [f"run {i}" for i in range(count)]
        assert all(same_colour and same_dashes for _, same_colour, same_dashes, _ in legend)
        assert len({look for *_, look in legend}) == count
        assert legend == legends[0]
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_whatever_runs_are_called_is_shown_as_text(stopped: Logged, opened: Callable[..., Any]) -> None:
    runs = [read_run(stopped.folder), read_run(stopped.wandb), *many_runs(2, HOSTILE)]
    tab = opened(comparison(runs), policy=False)
    assert tab.locator("main img, script, iframe").count() == 0
    names = tab.locator(".runs strong").all_inner_texts()
    assert all(name.startswith(HOSTILE) for name in names)
    assert len(set(names)) == 4
    assert tab.locator("table.settings").count() == 1
    assert len(tab.query_selector_all("figure svg[role=img]")) > 6


def test_runs_side_by_side_on_paper(opened: Callable[..., Any]) -> None:
    tab = opened(comparison(many_runs(12)), width=900, scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(0, 0, 0)"
    assert len(tab.pdf()) > 20_000


@BOTH_WIDTHS
def test_heat_map_is_as_wide_as_the_page_and_marks_stand_where_they_belong(
    opened: Callable[..., Any], width: int
) -> None:
    (run,) = many_runs(1)
    tab = opened(page(run), width=width, scheme="dark")
    found = tab.evaluate(
        """() => { const box = e => e.getBoundingClientRect();
             const svg = [...document.querySelectorAll('.wide svg')].find(svg => svg.checkVisibility());
             const cells = box(svg.querySelector('[id*=-QuadMesh_1]') || svg.querySelector('image'));
             const marks = [...svg.querySelectorAll('[id*=-line2d_] > path')].filter(
               path => box(path).height > cells.height / 2);
             return {left: cells.left, right: cells.right, main: box(document.querySelector('h1')).width,
                     figure: box(svg.parentElement).width,
                     lines: marks.map(mark => box(mark).left + box(mark).width / 2),
                     colours: marks.map(mark => getComputedStyle(mark).stroke),
                     text: [...svg.querySelectorAll('text')]
                       .map(t => [t.textContent, box(t).left + box(t).width / 2])}; }"""
    )
    assert found["figure"] == pytest.approx(found["main"], abs=1)

    def place(at: float) -> float:
        # One cell a step, from 1 to 59.
        return float(found["left"] + (found["right"] - found["left"]) * (at - 0.5) / 59)

    # Each mark is a light line and a dark one of its colour, on a dark page too.
    assert found["lines"] == pytest.approx([place(31), place(50), place(31), place(50)], abs=1)
    white = "rgb(255, 255, 255)"
    assert found["colours"] == [white, white, "rgb(194, 78, 0)", "rgb(1, 1, 1)"]
    ticks = {text: at for text, at in found["text"] if text in ("15", "45")}
    assert ticks == pytest.approx({"15": place(15), "45": place(45)}, abs=1)
    caption = tab.locator("figure.wide figcaption").first.inner_text()
    assert "Dashed: the plateau, at step 50. Dotted: effective_rank/last at step 31." in caption
    assert "The alarm was raised: effective_rank/last at step 31." in tab.locator(".words").inner_text()
    legend = tab.locator("figure svg[aria-labelledby^=loss] text").all_text_contents()
    assert {"collapse, step 31", "plateau, step 50"} <= set(legend)
