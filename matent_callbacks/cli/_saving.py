"""Keeps results whole: signals wait for the end of a batch, and files are written atomically."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write_atomically(out: Path, write: Callable[[IO[str]], object]) -> None:
    """Let ``write`` fill a file that then takes the place of ``out``: whenever the process ends, it is the old or new.

    Raises:
        OSError: If it cannot be written; the old file is still there then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # only its owner can read a temporary file
        os.replace(name, out)
    except BaseException:
        os.unlink(name)
        raise


class Interruption:
    """Inside ``with``, both signals raise KeyboardInterrupt; inside :meth:`hold`, only at its end.

    A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether a signal has been delayed."""
        self._held = 0

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._handle) for number in (_SIGNALS if main else ())}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delay signals until the end of the block; may be nested."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.pending and not self._held:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.pending = True
        if not self._held:
            raise KeyboardInterrupt
