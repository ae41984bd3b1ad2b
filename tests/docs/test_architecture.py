"""The page on the architecture is true of the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.fences import ROOT

PACKAGE = ROOT / "matent_callbacks"


def layers() -> dict[str, int]:
    """The layer of each package, from the table of the page."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}


def imported(path: Path) -> Iterator[str]:
    """What a file imports of the package, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            yield from node.module.split(".")[1:2] or (alias.name for alias in node.names)


def test_every_package_has_a_layer_and_imports_only_go_down():
    order = layers()
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()} <= order.keys()
    beside = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for own, layer in order.items()
        for path in ([PACKAGE / f"{own}.py"] if (PACKAGE / f"{own}.py").exists() else (PACKAGE / own).rglob("*.py"))
        for name in imported(path)
        if name != own and order.get(name, 0) >= layer
    ]
    assert beside == []
