"""The base class of both frameworks' ``CollapseAlarm``: arguments, state, logged values and messages."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from matent_callbacks.callbacks.docstrings import with_arguments_of
from matent_callbacks.callbacks.guard import Guard, guarded
from matent_callbacks.callbacks.unlogged import Unlogged
from matent_callbacks.collapse import CollapseDetector

# Prefix of the names that alarms are logged under; values with this prefix are not watched themselves.
_LOGGED = "collapse/"


class Alarm(NamedTuple):
    """One logged value that has collapsed."""

    key: str
    """The name that it is logged under."""
    step: int
    value: float
    reference: float
    """What it has fallen from."""
    message: str
    """All of this in one line."""


Action: TypeAlias = Literal["warn", "stop"] | Callable[[Alarm], Any]


@with_arguments_of(CollapseDetector)
class SharedCollapseAlarm:
    """Arguments of ``CollapseAlarm`` and its detectors; the adapters observe what is logged, save and stop.

    Args:
        monitor: A logged name or a glob; each matching name is watched separately.
        action: What an alarm does beyond its warning: ``"warn"``: nothing; ``"stop"``: it ends the training; or a
            function that is called on every rank with the alarm, which has ``key``, ``step``, ``value``,
            ``reference`` and ``message``.
        checkpoint: Save a checkpoint at an alarm, before training stops.
        on_error: ``"warn"``: an error in a run is warned about once, and training goes on; ``"raise"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        monitor: str = "effective_rank/*",
        *,
        floor: float = 0.25,
        patience: int = 10,
        relative_to: Literal["max", "first"] | float = "max",
        warmup_steps: int = 0,
        action: Action = "warn",
        checkpoint: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if action not in ("warn", "stop") and not callable(action):
            raise ValueError(f"`action` must be 'warn', 'stop' or a function, got {action!r}.")
        self.guard = Guard(type(self).__name__, on_error)
        self.monitor = monitor
        self.action = action
        self.checkpoint = checkpoint
        self.settings: dict[str, Any] = {"floor": floor, "patience": patience, "relative_to": relative_to}
        """Arguments of the detectors."""
        self._warmup_steps = warmup_steps
        self._new_detector = functools.partial(CollapseDetector, **self.settings, warmup_steps=warmup_steps)
        self._new_detector()  # raises for what is out of range
        self.start_over()

    def start_over(self) -> None:
        super().start_over()  # type: ignore[misc]  # that of the adapter
        self._detectors: dict[str, CollapseDetector] = {}
        self._raised: set[str] = set()
        self.unlogged = Unlogged(self.monitor, "no collapse of it could be told")

    @guarded
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        detectors = {key: detector.state_dict() for key, detector in self._detectors.items()}
        return {"detectors": detectors, "raised": sorted(self._raised), "warmup_steps": self._warmup_steps}

    @guarded
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; other settings judge the observations of before, too."""
        detectors = {key: self._new_detector() for key in state_dict["detectors"]}
        for key, detector in detectors.items():
            detector.load_state_dict(state_dict["detectors"][key])
        before = state_dict["warmup_steps"]
        if detectors and before != self._warmup_steps and self.settings["relative_to"] in ("max", "first"):
            warnings.warn(
                f"`warmup_steps` was {before} and is {self._warmup_steps} since training was resumed: values that were "
                f"observed before stay observed, and others stay unknown ({type(self).__name__}).",
                stacklevel=2,
            )
        self._detectors, self._raised = detectors, set(state_dict["raised"])
        if detectors:
            self.unlogged.found()

    def watched(self, names: Iterable[str]) -> list[str]:
        """Return those of the logged names that match ``monitor``."""
        return [name for name in names if fnmatch.fnmatchcase(name, self.monitor) and not name.startswith(_LOGGED)]

    def observe(self, step: int, values: Mapping[str, float]) -> tuple[list[Alarm], list[str]]:
        """Process watched values; return the alarms that they raise, and the names that recovered from one."""
        self.unlogged.found()
        alarms, recovered = [], []
        for key, value in values.items():
            detector = self._detectors.setdefault(key, self._new_detector())
            collapsed, reference = detector.update(step, value), detector.reference or 0.0
            if collapsed and key not in self._raised:
                alarms.append(Alarm(key, step, value, reference, f"{key}: {detector.reason}"))
            # A value that only begins to climb has not recovered, and raises no second alarm.
            elif key in self._raised and value >= self.settings["floor"] * reference:
                recovered.append(key)
        return alarms, recovered

    def note(self, alarms: Iterable[Alarm], recovered: Iterable[str]) -> dict[str, float]:
        """Remember which names have an alarm, and return what is logged: 1 at an alarm, 0 at a recovery."""
        changed = {alarm.key: 1.0 for alarm in alarms} | dict.fromkeys(recovered, 0.0)
        self._raised |= {key for key, raised in changed.items() if raised}
        self._raised -= {key for key, raised in changed.items() if not raised}
        return {f"{_LOGGED}{key}": raised for key, raised in changed.items()}

    def tell(self, alarms: Iterable[Alarm], alert: Callable[[str, str], None]) -> None:
        """Warn of each alarm in one line, and pass it to ``alert`` as a title and a text."""
        for alarm in alarms:
            warnings.warn(alarm.message, stacklevel=2)
            alert(f"Collapse of {alarm.key}", alarm.message)

    def act(self, alarms: Iterable[Alarm]) -> None:
        """Call ``action``, if it is a function."""
        if callable(self.action):
            for alarm in alarms:
                with self.guard("what `action` does"):
                    self.action(alarm)

    def warn_if_never_logged(self, logged: Iterable[str]) -> None:
        """Warn at the end of a run if the name was never logged, unless that was told before."""
        self.unlogged.at_end(logged)
