"""Turns errors of a callback inside somebody's training loop into warnings, so that they never end the training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

OnError = Literal["warn", "raise"]
_Value = TypeVar("_Value")
_Method = TypeVar("_Method", bound=Callable[..., Any])


class Attempt:
    """How a guarded block ended."""

    failed = False


class Guard:
    """Runs the work of one callback: ``with guard("pictures"): ...``.

    With ``on_error="warn"`` an error ends that work, with one warning for each kind of work; with ``"raise"`` it is
    raised. In a distributed run, a collective call must not follow other work in the same block: a rank where that
    work failed would skip the call and leave the others waiting.
    """

    def __init__(self, owner: str, on_error: OnError) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        self._owner = owner
        self._on_error = on_error
        self._warned: set[str] = set()

    def renewed(self) -> Guard:
        """Return a guard that has not warned of anything."""
        return Guard(self._owner, self._on_error)

    @contextmanager
    def __call__(self, work: str, message: str = "") -> Iterator[Attempt]:
        """Guard the block. The warning names ``work``, or it is ``message`` with ``{error}`` filled in."""
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:
            attempt.failed = True
            if self._on_error == "raise":
                raise
            if work not in self._warned:
                self._warned.add(work)
                text = " ".join([str(error), *getattr(error, "__notes__", ())])
                said = message.format(error=error) or (
                    f"Monitoring failed: {type(error).__name__}: {text} "
                    f"Training goes on without {work} ({self._owner})."
                )
                warnings.warn(said, stacklevel=3)

    def values(self, work: str, compute: Callable[[], dict[str, _Value]]) -> dict[str, _Value]:
        """Return what ``compute`` returns; an empty dict if it fails."""
        values: dict[str, _Value] = {}
        with self(work):
            values.update(compute())
        return values


def guarded(hook: _Method) -> _Method:
    """Decorate a method of an object with a ``guard``: it runs under that guard, and returns None where it fails."""

    @functools.wraps(hook)
    def under_guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.guard(f"what `{hook.__name__}` does"):
            return hook(self, *args, **kwargs)

    under_guard.is_guarded = True  # type: ignore[attr-defined]
    return under_guard  # type: ignore[return-value]


def without_run(callback: Any) -> dict[str, Any]:
    """Return the attributes of a callback for a copy or a pickle: its arguments, and nothing of its run."""
    clone: Any = object.__new__(type(callback))
    vars(clone).update({**vars(callback), "trainer": None, "guard": callback.guard.renewed()})
    clone.start_over()
    return dict(vars(clone))
