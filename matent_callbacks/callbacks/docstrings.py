"""Completes docstrings in Google's style, so that arguments that several classes or functions share are told once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Documented = TypeVar("_Documented", bound=Callable[..., Any])
_HEADINGS = ("Args", "Returns", "Raises", "Example")
_HEADING = re.compile(rf"^({'|'.join(_HEADINGS)}):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (?=\w+: )", re.MULTILINE)


def with_arguments_of(source: Callable[..., Any]) -> Callable[[_Documented], _Documented]:
    """Decorate a class or function, to add the arguments and errors that its docstring leaves out.

    They are taken from the docstring of ``source``. What the decorated object documents itself takes precedence.
    """

    def decorate(target: _Documented) -> _Documented:
        if target.__doc__ is not None and source.__doc__ is not None:  # there are none under `python -OO`
            target.__doc__ = completed(target.__doc__, source.__doc__, inspect.signature(target).parameters)
        return target

    return decorate


def completed(docstring: str, source: str, parameters: Iterable[str]) -> str:
    """``docstring`` with the entries of ``source`` for ``parameters``, in their order, and its errors."""
    own, other = (_sections(inspect.cleandoc(text)) for text in (docstring, source))
    told = _entries(other.get("Args", "")) | _entries(own.get("Args", ""))
    own["Args"] = "\n".join(told[name] for name in parameters if name in told)
    own.setdefault("Raises", other.get("Raises", ""))
    sections = [f"{heading}:\n{own[heading]}" for heading in _HEADINGS if own.get(heading)]
    return "\n\n".join([own[""], *sections]) + "\n"


def _sections(docstring: str) -> dict[str, str]:
    """The text before the first heading, under ``""``, and that below each heading."""
    text, *parts = _HEADING.split(docstring)
    return {"": text.rstrip()} | {heading: body.rstrip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def _entries(arguments: str) -> dict[str, str]:
    """What is said of each argument, by its name."""
    entries = [f"    {entry.rstrip()}" for entry in _ENTRY.split(arguments)[1:]]
    return {entry.split(":", 1)[0].strip(): entry for entry in entries}
