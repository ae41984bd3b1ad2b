"""Says what to pass to a callback that was created without arguments, as a Trainer does with a class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")


def needs_arguments(example: str) -> Callable[[Callable[Concatenate[_Self, _Arguments], None]], Any]:
    """Decorate an ``__init__`` with required arguments, of which ``example`` has some: none at all is a clear error."""

    def decorate(init: Callable[Concatenate[_Self, _Arguments], None]) -> Any:
        @functools.wraps(init)
        def checked(self: _Self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            if not args and not kwargs:
                kind = type(self).__name__
                raise TypeError(
                    f"`{kind}` needs arguments: pass an object, such as `{kind}({example})`, not the class."
                )
            init(self, *args, **kwargs)

        return checked

    return decorate
