"""Names the states of callbacks in a checkpoint, and says so if a callback was given to the wrong kind of Trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

_LIGHTNING = ("lightning", "pytorch_lightning")
_TRAINERS = {"transformers": "Hugging Face's Trainer", "lightning": "Lightning's Trainer"}


class StateKey:
    """Descriptor: class and ``name`` or ``monitor`` of a callback, numbered from the second of its kind in a Trainer.

    No other setting is part of it, so that a run that is resumed with other settings finds its state; they are compared
    when it is loaded.
    """

    def __get__(self, callback: Any, owner: type) -> Any:
        # Lightning asks each callback for its key when the Trainer is made, the first that it does with it.
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").partition(".")[0] in _LIGHTNING:
            if "lightning" not in _ours(owner).__module__:
                _refuse(owner, "lightning")
            if callback is None:
                raise TypeError(
                    f"`callbacks` needs an object, `{owner.__name__}(...)`, got the class `{owner.__name__}`."
                )
        if callback is None:
            return self
        # The callbacks of a Trainer that is being made are known from there only.
        listed = caller.f_locals.get("callbacks")
        if not isinstance(listed, list) or not _holds(listed, callback):
            listed = callback.callbacks_of_trainer
        return _numbered(callback, listed)


def refusing(trainer: str) -> Callable[..., NoReturn]:
    """Return a method in place of an event of the ``trainer``, which the callback is not for."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(type(self), trainer)

    return refuse


def _refuse(owner: type, trainer: str) -> NoReturn:
    ours = _ours(owner)
    package = __name__.partition(".")[0]
    own = "lightning" if trainer == "transformers" else "transformers"
    advice = f"use `from {package}.{trainer} import {ours.__name__}`"
    if ours.__name__ == "ReadingPrinter":
        advice = "there is none for this one"
    raise TypeError(f"This `{ours.__name__}` is for {_TRAINERS[own]}, and was given to {_TRAINERS[trainer]}: {advice}.")


def _ours(owner: type) -> type:
    """Return the class of this package that a class is or derives from."""
    package = __name__.partition(".")[0]
    return next(base for base in owner.__mro__ if base.__module__.partition(".")[0] == package)


def _numbered(callback: Any, callbacks: Iterable[Any]) -> str:
    key = _key(callback)
    before = 0
    for other in callbacks:
        if other is callback:
            break
        before += _has_key(other) and _key(other) == key
    return f"{key} #{before + 1}" if before else key


def _has_key(callback: Any) -> bool:
    return any(isinstance(vars(cls).get("state_key"), StateKey) for cls in type(callback).__mro__)


def _key(callback: Any) -> str:
    kind = type(callback).__name__
    if hasattr(callback, "monitor"):
        return f"{kind}({callback.monitor})"
    name = getattr(callback, "name", None)
    return kind if name is None else f"{kind}(name={name})"


def _holds(callbacks: list[Any], callback: Any) -> bool:
    return any(other is callback for other in callbacks)
