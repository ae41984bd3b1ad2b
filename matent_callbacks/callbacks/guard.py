"""Turns errors of a callback inside somebody's training loop into warnings, so that they never end the training."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

OnError = Literal["warn", "raise"]
_Result = TypeVar("_Result")
_Method = TypeVar("_Method", bound=Callable[..., Any])
# Attribute of a hook that is guarded already, or must not be.
_SETTLED = "_settled"


class Attempt:
    """Tells how a guarded block ended."""

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
            if not self.absorbs(error, work, message):
                raise

    def absorbs(self, error: Exception, work: str, message: str = "") -> bool:
        """Warn of an error, once for each kind of work; return False if it is to be raised instead."""
        if self._on_error == "raise":
            return False
        if work not in self._warned:
            self._warned.add(work)
            text = " ".join([str(error), *getattr(error, "__notes__", ())])
            told = message.format(error=error) or (
                f"Monitoring failed: {type(error).__name__}: {text} Training goes on without {work} ({self._owner})."
            )
            warnings.warn(told, stacklevel=4)
        return True

    def values(self, work: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return what ``compute`` returns; an empty dict if it fails."""
        values: dict[str, float] = {}
        with self(work):
            values.update(compute())
        return values

    def run_between(self, work: str, halves: Generator[None, Any, None], call: Callable[[], _Result]) -> _Result:
        """Return the result of ``call``, run between the two halves of a generator that yields once.

        The generator is sent the result. Its errors are guarded, those of ``call`` are raised.
        """
        with self(work):
            next(halves)
        try:
            result = call()
        except BaseException:
            with self(work):
                halves.close()
            raise
        with self(work), suppress(StopIteration):
            halves.send(result)
        return result


class GuardedHooks:
    """Base of the callbacks: each method that overrides one of the framework's runs under the callback's guard.

    This holds for the classes of this package only: methods that a user's subclass overrides are not guarded.
    """

    guard: Guard

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not _is_ours(cls):
            return
        # Also methods of bases outside the framework, which become hooks only in this class.
        for name in {name for base in cls.__mro__ if _is_ours(base) for name in vars(base)}:
            hook = inspect.getattr_static(cls, name)
            if inspect.isfunction(hook) and _is_of_framework(cls, name) and not hasattr(hook, _SETTLED):
                setattr(cls, name, _guarded(hook))

    def start_over(self) -> None:
        """Replace everything that comes from a run by new objects, so that only the arguments are left."""

    def __getstate__(self) -> dict[str, Any]:
        """Let copies and pickles have the arguments of the callback, and nothing of its run."""
        clone = object.__new__(type(self))
        vars(clone).update(vars(self))
        clone.guard = self.guard.renewed()
        clone.start_over()
        return vars(clone)


def unguarded(hook: _Method) -> _Method:
    """Mark a hook that reports a wrong configuration before training: its errors are raised."""
    setattr(hook, _SETTLED, True)
    return hook


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def under_guard(self: GuardedHooks, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            if not self.guard.absorbs(error, f"what `{hook.__name__}` does"):
                raise

    setattr(under_guard, _SETTLED, True)
    return under_guard


def _is_of_framework(cls: type, name: str) -> bool:
    bases = [base for base in cls.__mro__ if base is not object and not _is_ours(base)]
    return not name.startswith("_") and any(name in vars(base) for base in bases)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]
