"""Reads text as a stream of documents, one per line, from a file, a folder or stdin."""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

STDIN = "-"
OTHER_TEXT = "--text is not what it was when this measurement was interrupted: give another --out."
# A line is cut here, so that a file without line ends cannot fill the memory; no model reads that far.
_LONGEST_LINE = 2**24


class TextError(ValueError):
    """The text cannot be read as asked; the message is one sentence."""


class Document(NamedTuple):
    """One document, or what was found in its place."""

    text: str
    trouble: str | None
    """``empty``, ``damaged``, ``not_utf8`` or ``unreadable``, with an empty text; None if nothing is wrong."""
    place: str
    end: int
    """Bytes read so far, this document included."""
    checksum: int
    """CRC-32 of all that was read so far."""


class Text:
    """The documents of ``--text``, which can be read from the start as often as there are models."""

    def __init__(self, source: str, *, field: str | None, stdin: IO[bytes] | None = None) -> None:
        self._field = field
        self._stdin = stdin or sys.stdin.buffer
        self._kept: IO[bytes] | None = None
        self._files = None if source == STDIN else _files(Path(source))
        for file in self._files or []:
            if field is None and file.suffix.lower() in (".jsonl", ".ndjson"):
                raise TextError(f"--text has JSON in {file}: --field must name the field that holds the text.")

    @property
    def note(self) -> str | None:
        """What the user should know about the files, one sentence."""
        tables = [file for file in self._files or [] if file.suffix.lower() in (".csv", ".tsv")]
        if not tables or self._field is not None:
            return None
        return (
            f"--text has a table in {tables[0]}: each of its lines counts as a document, also that with the names of "
            "the columns. JSON Lines have the text in a field, --field."
        )

    @property
    def size(self) -> int | None:
        """Bytes; ``None`` for stdin, whose size is not known before its end."""
        if self._files is None:
            return None
        return sum(file.stat().st_size for file in self._files if file.is_file())

    def keep(self) -> None:
        """Keep what comes from stdin on disk, since it will be read more than once."""
        if self._files is None:
            self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the text

    def documents(self) -> Iterator[Document]:
        """Yield all documents from the first on, including those that cannot be used."""
        end = checksum = 0
        for line, place in self._lines():
            if line is None:
                yield Document("", "unreadable", place, end, checksum)
                continue
            end, checksum = end + len(line), zlib.crc32(line, checksum)
            text, trouble = _read(line, self._field)
            yield Document(text, trouble, place, end, checksum)

    def checksums(self, ends: Iterable[int], *, whole: bool = False) -> tuple[dict[int, int], int]:
        """Return the CRC-32 of all up to each of ``ends`` that is the end of a document, and how far was read.

        That is to the end of the text with ``whole``, or else as far as it takes.
        """
        asked, found = set(ends), {0: 0}
        end = checksum = 0
        for line, _ in self._lines() if whole or asked - {0} else ():
            if line is None:
                continue
            end, checksum = end + len(line), zlib.crc32(line, checksum)
            if end in asked:
                found[end] = checksum
            if not whole and end >= max(asked):
                break
        return found, end

    def _lines(self) -> Iterator[tuple[bytes | None, str]]:
        if self._files is None:
            for number, line in enumerate(self._stdin_lines(), 1):
                yield line, f"line {number} of stdin"
            return
        for file in self._files:
            try:
                with file.open("rb") as stream:
                    for number, line in enumerate(_whole_lines(stream), 1):
                        yield line, f"line {number} of {file}"
            except OSError as error:
                yield None, f"{file}, {error.strerror}"

    def _stdin_lines(self) -> Iterator[bytes]:
        if self._kept is None:
            yield from _whole_lines(self._stdin)
            return
        self._kept.seek(0)
        yield from _whole_lines(self._kept)
        # The rest, which earlier models did not need to read.
        for line in _whole_lines(self._stdin):
            # Of a line that is too long the rest has been left out.
            self._kept.write(line + b"\n" if len(line) == _LONGEST_LINE else line)
            yield line


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise TextError(f"--text must be a file, a folder, or - for stdin, and there is no {source}.")
    if not source.is_dir():
        return [source]
    inside = (path.relative_to(source) for path in source.rglob("*") if not path.is_dir())
    files = sorted(path for path in inside if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise TextError(f"--text is the folder {source}, and there is no file in it.")
    return [source / file for file in files]


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield lines; of one that is too long, only the beginning."""
    while line := stream.readline(_LONGEST_LINE):
        yield line
        while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            line = stream.readline(_LONGEST_LINE)


def _read(line: bytes, field: str | None) -> tuple[str, str | None]:
    """Return the text of a line and what is wrong with it."""
    try:
        text = line.decode("utf-8-sig", errors="ignore" if len(line) == _LONGEST_LINE else "strict")
    except UnicodeDecodeError:
        return "", "not_utf8"
    if "\0" in text:  # UTF-16, or no text at all
        return "", "not_utf8"
    if field is not None and text.strip():
        try:
            text = json.loads(text)[field]
        except (ValueError, LookupError, TypeError, RecursionError):
            return "", "damaged"
        if not isinstance(text, str):
            return "", "damaged"
    else:
        text = text.rstrip("\r\n")
    return (text, None) if text.strip() else ("", "empty")
