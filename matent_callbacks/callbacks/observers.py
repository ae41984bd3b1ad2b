"""What ``PlateauStopping`` and ``CollapseAlarm`` decide, log and say of observed values, in every framework."""

from __future__ import annotations

import fnmatch
import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

from matent_callbacks.callbacks.guard import Guard
from matent_callbacks.callbacks.unlogged import Unlogged
from matent_callbacks.collapse import CollapseDetector
from matent_callbacks.plateau import PlateauDetector

_Init = TypeVar("_Init", bound=Callable[..., None])

# Observations in a checkpoint, for a resumed run with a longer window.
_KEPT = 500
# Prefix of the names that alarms are logged under; values with this prefix are not observed themselves.
_COLLAPSE = "collapse/"


class Alarm(NamedTuple):
    """One logged value that has collapsed or is on its plateau."""

    key: str
    """The name that it is logged under."""
    step: int
    value: float
    reference: float
    """What it has fallen from; NaN at a plateau."""
    message: str
    """All of this in one line."""


Action: TypeAlias = Literal["warn", "stop"] | Callable[[Alarm], Any]


class PlateauObserver:
    """Raises an alarm while a value is on its plateau."""

    action: Action = "stop"
    saves_checkpoint = False

    def __init__(self, monitor: str, *, verbose: bool, **settings: Any) -> None:
        self.monitor = monitor
        self.unlogged = Unlogged(monitor, "training could not stop on it")
        self.detector = PlateauDetector(**settings)
        self._verbose = verbose
        self._settings = settings
        self._history: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def watched(self, logged: Iterable[str]) -> list[str]:
        """Return those of the logged names that are observed."""
        return [name for name in logged if name == self.monitor]

    def observe(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Process watched values; return the alarms that they raise."""
        self.unlogged.found()
        value = values[self.monitor]
        if math.isfinite(value):
            while self._history and self._history[-1][0] >= step:
                self._history.pop()
            self._history.append((step, value))
        if not self.detector.update(step, value):
            return []
        return [Alarm(self.monitor, step, value, math.nan, f"{self.monitor}: {self.detector.reason}")]

    def logged_values(self, alarms: Iterable[Alarm]) -> dict[str, float]:
        """Return what is logged after :meth:`observe`, with the alarms of all ranks."""
        trend = {} if self.detector.trend is None else {f"plateau/{self.monitor}": self.detector.trend}
        return {**trend, f"plateau/{self.monitor}/since_progress": float(self.detector.since_progress)}

    def report(self, alarms: Iterable[Alarm], alert: Callable[[str, str], None], *, stops_now: bool) -> None:
        """Print or warn of each alarm in one line; ``alert`` takes a title and a text."""
        if stops_now and self._verbose:
            for alarm in alarms:
                print(f"Stopping: {alarm.message}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, and what a report of the run needs, as JSON types."""
        history = [list(observation) for observation in self._history]
        return {**self.detector.state_dict(), "monitor": self.monitor, "settings": self._settings, "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the present settings judge the observations of before, too."""
        detector = PlateauDetector(**self._settings)
        # First, since it raises for what is no state.
        detector.load_state_dict(state)
        history = deque(((int(step), float(value)) for step, value in state["history"]), maxlen=_KEPT)
        if state["settings"] != self._settings:
            detector = PlateauDetector(**self._settings)
            for step, value in history:
                detector.update(step, value)
        self.detector, self._history = detector, history
        if history:
            self.unlogged.found()


class CollapseObserver:
    """Raises an alarm once when a value collapses, and again only after it has recovered; as ``PlateauObserver``."""

    def __init__(self, monitor: str, *, action: Action, checkpoint: bool, **settings: Any) -> None:
        if action not in ("warn", "stop") and not callable(action):
            raise ValueError(f"`action` must be 'warn', 'stop' or a function, got {action!r}.")
        self.monitor = monitor
        self.unlogged = Unlogged(monitor, "no collapse of it could be told")
        self.action = action
        self.saves_checkpoint = checkpoint
        self._settings = settings
        self._new_detector = functools.partial(CollapseDetector, **settings)
        self._new_detector()  # raises for what is out of range
        self._detectors: dict[str, CollapseDetector] = {}
        self._raised: set[str] = set()
        self._recovered: list[str] = []

    def watched(self, logged: Iterable[str]) -> list[str]:
        return [name for name in logged if fnmatch.fnmatchcase(name, self.monitor) and not name.startswith(_COLLAPSE)]

    def observe(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        self.unlogged.found()
        alarms = []
        for key, value in values.items():
            detector = self._detectors.setdefault(key, self._new_detector())
            collapsed, reference = detector.update(step, value), detector.reference or 0.0
            if collapsed and key not in self._raised:
                alarms.append(Alarm(key, step, value, reference, f"{key}: {detector.reason}"))
            # A value that only begins to climb has not recovered, and raises no second alarm.
            elif key in self._raised and value >= self._settings["floor"] * reference:
                self._recovered.append(key)
        return alarms

    def logged_values(self, alarms: Iterable[Alarm]) -> dict[str, float]:
        recovered, self._recovered = self._recovered, []
        changed = {alarm.key: 1.0 for alarm in alarms} | dict.fromkeys(recovered, 0.0)
        self._raised = {key for key in {*self._raised, *changed} if changed.get(key, 1.0)}
        return {f"{_COLLAPSE}{key}": raised for key, raised in changed.items()}

    def report(self, alarms: Iterable[Alarm], alert: Callable[[str, str], None], *, stops_now: bool) -> None:
        for alarm in alarms:
            warnings.warn(alarm.message, stacklevel=2)
            alert(f"Collapse of {alarm.key}", alarm.message)

    def state_dict(self) -> dict[str, Any]:
        detectors = {key: detector.state_dict() for key, detector in self._detectors.items()}
        warmup_steps = self._settings["warmup_steps"]
        return {"detectors": detectors, "raised": sorted(self._raised), "warmup_steps": warmup_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        detectors = {key: self._new_detector() for key in state["detectors"]}
        for key, detector in detectors.items():
            detector.load_state_dict(state["detectors"][key])
        before, now = state["warmup_steps"], self._settings["warmup_steps"]
        if detectors and before != now and self._settings["relative_to"] in ("max", "first"):
            warnings.warn(
                f"`warmup_steps` was {before} and is {now} since training was resumed: values that were observed "
                "before stay observed, and others stay unknown (CollapseAlarm).",
                stacklevel=2,
            )
        self._detectors, self._raised = detectors, set(state["raised"])
        if detectors:
            self.unlogged.found()


Observer: TypeAlias = PlateauObserver | CollapseObserver


def call_action(observer: Observer, alarms: Iterable[Alarm], guard: Guard) -> None:
    """Call the user's ``action`` with each alarm, if it is a function."""
    if callable(observer.action):
        for alarm in alarms:
            with guard("what `action` does"):
                observer.action(alarm)


def needs_arguments(init: _Init) -> _Init:
    """Decorate an ``__init__`` with required arguments: it says what to pass if a Trainer was given the class."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if not args and not kwargs:
            kind = type(self).__name__
            example = '"eval_loss", mode="min", min_delta=0.01, patience=5'
            raise TypeError(f"`{kind}` needs arguments: pass an object, such as `{kind}({example})`, not the class.")
        init(self, *args, **kwargs)

    return cast("_Init", checked)
