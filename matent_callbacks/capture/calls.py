"""Watches all calls of a module: a hook sees only ``module(...)``, and not ``module.forward(...)``."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Around = Callable[..., Any]
"""Called as ``around(module, forward, *args, **kwargs)`` in place of ``forward(*args, **kwargs)``, which it calls."""


def around_calls(module: nn.Module, around: Around, *, replicas: bool = True) -> Callable[[], None]:
    """Wrap every call of ``module.forward`` in ``around``; returns a function that undoes this.

    Args:
        module: The module to watch.
        around: The wrapper. Of several, the one added last is the outermost.
        replicas: Whether ``nn.DataParallel`` may call replicas of ``module``. Recognising them takes a hook on it.
    """
    stand_in = _stand_ins.get(module)
    if stand_in is None or stand_in.is_wrapped:
        stand_in = _stand_ins[module] = _StandIn(module)
    if stand_in.is_in_graph:
        return _do_nothing
    stand_in.add(around)
    note = functools.partial(_note_replica, module)
    handle = module.register_forward_pre_hook(note) if replicas else None
    return functools.partial(_undo, stand_in, around, handle)


def _do_nothing() -> None:
    pass


def _undo(stand_in: _StandIn, around: Around, handle: RemovableHandle | None) -> None:
    stand_in.remove(around)
    if handle is not None:
        handle.remove()


class _StandIn:
    """Replaces the ``forward`` of one module instance while its calls are watched."""

    def __init__(self, module: nn.Module) -> None:
        self._reference = weakref.ref(module)
        self._around: tuple[Around, ...] = ()
        self.is_in_graph = False
        """Whether torch.compile traced it into a graph. Then it is not added again: that would invalidate the graph."""
        self._before: Any = None
        """The ``forward`` that the module's ``__dict__`` held before, or None."""
        self.__wrapped__: Callable[..., Any] | None = None
        """The ``forward`` that is replaced, under the name by which :mod:`inspect` finds its signature."""

    @property
    def is_wrapped(self) -> bool:
        """Whether other code has wrapped its own ``forward`` around this one, and may still call it."""
        return not self._around and self.__wrapped__ is not None

    def add(self, around: Around) -> None:
        if not self._around:
            module = self._module
            self._before = vars(module).get("forward")
            self.__wrapped__ = module.forward
            vars(module)["forward"] = self
        self._around = (*self._around, around)

    def remove(self, around: Around) -> None:
        self._around = tuple(other for other in self._around if other is not around)
        attributes = vars(self._module)
        if self._around or attributes.get("forward") is not self:
            return
        if self._before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self._before
        self._before = self.__wrapped__ = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.__wrapped__
        assert forward is not None
        if torch.compiler.is_compiling():
            self.is_in_graph = True
            return forward(*args, **kwargs)
        module = self._module
        running = _running.setdefault(threading.get_ident(), [])
        actual = _actual(module, running)
        if actual is not module and self._before is None:
            forward = functools.partial(type(actual).forward, actual)
        for around in self._around:
            forward = functools.partial(around, module, forward)
        running.append((module, actual))
        try:
            return forward(*args, **kwargs)
        finally:
            running.pop()
            if not running:
                _running.pop(threading.get_ident(), None)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module, made while it is watched, is not watched.
        if self._before is not None:
            return _same, (self._before,)
        return getattr, (self._module, "forward")

    @property
    def _module(self) -> nn.Module:
        module = self._reference()
        assert module is not None  # this is called through it
        return module


_stand_ins: weakref.WeakKeyDictionary[nn.Module, _StandIn] = weakref.WeakKeyDictionary()

# Keyed by thread: `nn.DataParallel` runs replicas of a model in threads.
_called_replica: dict[int, tuple[nn.Module, nn.Module]] = {}
"""What is about to be called: a watched module, and its replica."""
_running: dict[int, list[tuple[nn.Module, nn.Module]]] = {}
"""The watched modules whose ``forward`` runs, outermost first, each with itself or its replica."""


def _note_replica(original: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Note before a call which replica is called: in its copied ``__dict__`` is the stand-in of the original."""
    if module is not original and not torch.compiler.is_compiling():
        _called_replica[threading.get_ident()] = original, module


def _actual(module: nn.Module, running: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    """The replica of ``module`` that this thread runs, or ``module`` itself."""
    original, called = _called_replica.pop(threading.get_ident(), (module, None))
    if original is module and called is not None:
        return called
    if not running or running[-1][0] is running[-1][1]:
        return module
    outer, replica = running[-1]
    name = next((name for name, inner in outer.named_modules() if inner is module), None)
    return module if name is None else replica.get_submodule(name)


def _same(value: Any) -> Any:
    return value
