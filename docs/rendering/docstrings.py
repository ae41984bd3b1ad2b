"""Docstrings are written for ``help()`` and Sphinx's roles; this brings them to Markdown when the site is built.

Formulas become text with HTML sub- and superscripts: MathJax would have to be loaded from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

import griffe

PUBLIC = ("functional", "transformers", "lightning", "plot", "report", "scaling_law")
# A bar as such would end a cell of a table.
SYMBOLS = {
    "alpha": "&alpha;", "mu": "&mu;", "pi": "&pi;", "sigma": "&sigma;", "sum": "∑", "le": "≤", "ge": "≥", "in": "∈",
    "cap": "∩", "circ": "∘", "otimes": "⊗", "leftarrow": "←", "top": "&#8868;", "lVert": "‖", "rVert": "‖",
    "lvert": "&#124;", "rvert": "&#124;", "cdot": "·", "neq": "≠", "exp": "exp", ",": " ", "log": "log", "max": "max",
    "min": "min",
}  # fmt: skip
TOKEN = re.compile(r"\\(?:[A-Za-z]+|,)|\s+|[^\\\s]")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the package once all of it is collected."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once a package."""
        places = dict(_places(pkg))
        for obj in _objects(pkg):
            if obj.docstring:
                obj.docstring.value = to_markdown(obj.docstring.value, places)


def _places(package: griffe.Module) -> Iterator[tuple[str, str]]:
    """Public names, in full and short, each with the path that autorefs finds it by."""
    for module in (package, *(package[name] for name in PUBLIC)):
        for name in module.exports or ():
            member = module[name]
            # A function hides the module of its name, but not from a reader of the files.
            found = member[name] if member.is_module and name in member.members else member
            yield name, found.canonical_path
            yield f"{module.path}.{name}", found.canonical_path


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def to_markdown(docstring: str, places: Mapping[str, str]) -> str:
    """Roles, formulas and tables of reStructuredText, and Google's ``Example``, in what mkdocstrings reads."""
    text = re.sub(r":math:`([^`]*)`", lambda m: formula(m[1]), docstring)
    text = re.sub(r":(?:class|func|meth):`([^`]*)`", lambda m: reference(m[1], places), text)
    text = re.sub(r"^=+(?: +=+)+\n(.*?)^=+(?: +=+)+$", table, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def reference(target: str, places: Mapping[str, str]) -> str:
    """A link to what the API page has, or else the name as code."""
    path = places.get(target.lstrip("~"))
    short = target.rsplit(".", 1)[-1] if target.startswith("~") else target
    return f"[`{short}`][{path}]" if path else f"`{short}`"


def table(match: re.Match[str]) -> str:
    """A simple table. A row whose first cell is empty, or follows one that ends in a comma, goes on."""
    starts = [column.start() for column in re.finditer("=+", match[0].splitlines()[0])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for line in match[1].splitlines():
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if rows and (not cells[0] or rows[-1][0].endswith(",")):
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    head = ["|" + " |" * len(starts), "|" + "---|" * len(starts)]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def formula(tex: str) -> str:
    """The little of LaTeX that docstrings use, as HTML; anything else is an error."""
    tight = re.sub(r"(?<=\\l[Vv]ert) +| +(?=\\r[Vv]ert)", "{}", tex)
    tokens = TOKEN.findall(re.sub(r"\s+|\\,\s+", " ", tight))
    text = _sequence(tokens)
    if tokens:
        raise ValueError(f"Formula {tex!r} has an unmatched brace.")
    return f'<span class="formula">{text}</span>'


def _sequence(tokens: list[str]) -> str:
    """Takes from the front of ``tokens`` up to a closing brace."""
    out = ""
    while tokens and tokens[0] != "}":
        mark = {"_": "sub", "^": "sup"}.get(tokens[0])
        if mark:
            tokens.pop(0)
        piece = _argument(tokens)
        out += f"<{mark}>{piece}</{mark}>" if mark else piece
    return out


def _argument(tokens: list[str]) -> str:
    """Takes one character, group or command with its arguments."""
    token = tokens.pop(0)
    if token == "{":
        inner = _sequence(tokens)
        tokens.pop(0)
        return inner
    if token.isspace():
        return " "
    if not token.startswith("\\"):
        return "&minus;" if token == "-" else html.escape(token)
    command = token[1:]
    if command == "frac":
        return f"{_argument(tokens)}/{_bracketed(_argument(tokens))}"
    if command in ("sqrt", "bar", "mathrm"):
        while tokens[0].isspace():
            tokens.pop(0)
        inner = _argument(tokens)
        return {"sqrt": f"√{_bracketed(inner)}", "bar": f"{inner}\u0304", "mathrm": inner}[command]
    return SYMBOLS[command]


def _bracketed(text: str) -> str:
    return f"({text})" if re.search(" |&minus;", text) else text
