"""Lets signals wait for the end of a batch, so that results stay whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
