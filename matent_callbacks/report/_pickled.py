"""Reads the plain values of a pickled object without unpickling it, so that nothing in it is imported or called."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

_LARGEST, _DEEPEST = 2**20, 3
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME", "STOP")


class _Object:
    """Placeholder for an object that unpickling would have created by a call."""

    def __init__(self, arguments: Any = ()) -> None:
        # A member of an enumeration, a path or a device is created from its value.
        self.value = arguments[0] if isinstance(arguments, tuple) and len(arguments) == 1 else None
        self.state: Any = {}


def attributes(file: Path) -> dict[str, Any]:
    """Read the attributes of an object that was saved with ``torch.save``; none if they cannot be read.

    Values are numbers, strings, ``None``, and lists and mappings of those; anything else is left out.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (member,) = (item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
            if member.file_size > _LARGEST:
                return {}
            state = _plain(_top(archive.read(member)))
    except Exception:  # whatever a damaged or hostile file leads to
        return {}
    return state if isinstance(state, dict) else {}


def _top(data: bytes) -> Any:
    """Follow the instructions of a pickle, if they only build plain values, and return the top of its stack."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        begin = marks.pop()
        items = stack[begin:]
        del stack[begin:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if isinstance(stack[-1], dict):
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_Object())
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Object()]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_Object(stack[-1])]
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name not in _IGNORED:
            raise ValueError(f"unknown instruction {name}")
    return stack[-1]


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, _Object):
        value = value.value if value.value is not None else value.state
    if isinstance(value, dict) and depth < _DEEPEST:
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    return value
