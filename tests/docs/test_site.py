"""The site builds without a warning, is whole, and loads nothing from elsewhere."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from matent_callbacks.accumulate.catalogue import METRICS
from tests.docs.fences import PAGES, ROOT

PUBLIC = (
    "matent_callbacks",
    *(f"matent_callbacks.{n}" for n in ("functional", "transformers", "lightning", "plot", "report", "scaling_law")),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag != "a" and not (tag == "link" and values.get("rel") in ("canonical", "prev", "next")):
            self.addresses += [values[name] or "" for name in ("src", "href", "srcset") if name in values]


def test_nothing_is_loaded_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses
        assert not [address for address in loaded.addresses if re.match(r"(\w+:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_api_page_has_every_public_name(site: Path):
    page = (site / "api.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'id="([\w.]+)"', page))
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            assert headings & {f"{module}.{name}", f"{module}.{name}.{name}"}, f"{module}.{name}"


def test_the_api_page_tells_of_arguments_that_are_told_elsewhere(site: Path):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8")))
    for name, times in (
        ("Upper bound on the tokens that one reading accumulates per layer", 3),
        ("Number of observations in which min_delta has to be gained", 3),
        ("Number of neighbours in mutual_knn and mutual_knn_z", 3),
    ):
        assert page.count(name) == times, name


def test_no_markup_of_docstrings_is_left_over(site: Path):
    page = html.unescape((site / "api.html").read_text(encoding="utf-8"))
    assert 'class="formula"' in page
    assert not re.findall(r":(?:math|class|func|meth):|={6,}|<h\d[^>]*>\s*Trainer\(", page)


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("effective rank dropped middle layers bad", "pretrained_models"),
        ("attention sink BOS", "pretrained_models"),
        ("LoRA 7B memory", "recipes"),
        ("Qwen2.5-VL stop plateau", "recipes"),
        ("Accelerate W&B no Trainer", "recipes"),
        ("axolotl", "recipes"),
        ("LLaMA-Factory", "recipes"),
        ("Unsloth", "recipes"),
        ("base against tuned", "recipes"),
    ],
)
def test_the_search_finds_a_question_by_its_own_words(site: Path, words: str, page: str):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    sections = [
        html.unescape(f"{section['title']} {section['text']}").lower()
        for section in index["docs"]
        if section["location"].startswith(f"{page}.html#")
    ]
    assert any(all(word.lower() in section for word in words.split()) for section in sections)


def test_every_name_of_the_catalogue_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/quantities.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(METRICS)
    for name, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 4, name  # formula, range, unit, source
        assert all(cells), name


def test_the_readme_links_to_what_exists():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).is_file()] == []
