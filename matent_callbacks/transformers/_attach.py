"""Finds the Trainer that a callback was passed to, and its running evaluation, by the Trainer's internals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from matent_callbacks.callbacks.guard import Guard, without_run
from matent_callbacks.callbacks.state_keys import StateKey, refusing
from matent_callbacks.capture.purpose import frames
from matent_callbacks.report._settings import SETTINGS, flat

# Key of the states of all callbacks of this package, in the Trainer's own record of callback states.
_STATES = "matent_callbacks"


class AttachedCallback(TrainerCallback):
    """A callback that knows its Trainer, comes before the reporters, and keeps its state in checkpoints."""

    guard: Guard
    order: ClassVar[int]
    """Rank among the callbacks of this package: those that measure come before those that read what was measured."""

    trainer: Any = None

    state_key = StateKey()
    """Identifies this callback's state in the checkpoint."""

    # Events of Lightning, which has other callbacks.
    setup = teardown = on_exception = refusing("lightning")

    @property
    def callbacks_of_trainer(self) -> list[TrainerCallback]:
        """The callbacks of the Trainer, once it is known."""
        return [] if self.trainer is None else list(self.trainer.callback_handler.callbacks)

    def attach(self, trainer: Trainer) -> None:
        """Attach the callback to a Trainer. Only needed if the Trainer cannot be found from its events.

        Args:
            trainer: The Trainer; the callback is added to it if it is not there.
        """
        callbacks = trainer.callback_handler.callbacks
        # Before the reporters, so that what is added to a log record reaches them. Only ever moved towards the front:
        # the handler may be iterating over its list, and would skip a callback otherwise.
        place = sum(1 for _ in itertools.takewhile(self._goes_behind, callbacks))
        if self not in callbacks[: place + 1]:
            if self in callbacks:
                callbacks.remove(self)
            callbacks.insert(place, self)
        self.trainer = trainer

    def is_attached_to(self, trainer: Trainer) -> bool:
        """Whether this is the callback's Trainer; no longer so once the callback was removed from it."""
        return self.trainer is trainer and self in trainer.callback_handler.callbacks

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.find_trainer()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A search over hyperparameters trains several times.
        self.start_over()
        self.find_trainer()
        self.check()
        with self.guard("its state from the checkpoint"):
            # If the Trainer resumes, its state was loaded from the checkpoint, and ours is part of it.
            saved = (state.stateful_callbacks or {}).get(_STATES, {}).get(self.state_key)
            if saved is not None:
                self.load_state_dict(saved)
        with self.guard("the settings of the run in the checkpoint"):
            # For `matent report`: what the Trainer itself saves of them is a pickle. `to_dict` may change `args`.
            others = state.stateful_callbacks or {}
            settings = {**others.get(SETTINGS, {}), **flat(vars(args)), **self.settings}
            state.stateful_callbacks = {**others, SETTINGS: settings}
        with self.guard("what is done when training begins"):
            self.begin(state)

    @property
    def settings(self) -> dict[str, str]:
        """What the callback adds to the settings of the run."""
        return {}

    def check(self) -> None:
        """Called before training, when the Trainer is known; a wrong configuration raises here."""

    def begin(self, state: TrainerState) -> None:
        """Called after :meth:`check`, when the state in the checkpoint has been loaded, if there was one."""

    def start_over(self) -> None:
        """Replace everything that comes from a run by new objects, so that only the arguments are left."""

    def __getstate__(self) -> dict[str, Any]:
        return without_run(self)

    def keep_state(self, state: TrainerState) -> None:
        """Put the callback's state where the next checkpoint will save it."""
        # Not as an `ExportableState`: from that the Trainer would create a new callback, and a probe is not JSON.
        with self.guard("its state in the checkpoint"):
            if state.stateful_callbacks is None:
                state.stateful_callbacks = {}
            state.stateful_callbacks.setdefault(_STATES, {})[self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON types."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        raise NotImplementedError

    def find_trainer(self) -> None:
        """Attach to the Trainer whose event is being handled: it is in none of the arguments, but on the stack.

        Raises:
            RuntimeError: If there is none and :meth:`attach` was not called.
        """
        trainer = trainer_of(self)
        if trainer is None and self.trainer is None:
            raise RuntimeError("No Trainer was found behind this event: call `callback.attach(trainer)` first.")
        self.attach(trainer or self.trainer)

    def _goes_behind(self, other: TrainerCallback) -> bool:
        return isinstance(other, AttachedCallback) and other.order <= self.order and other is not self


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """Find the Trainer whose event the callback is handling, if it is on the stack."""
    for trainer in _on_stack("self"):
        handler = getattr(trainer, "callback_handler", None) if isinstance(trainer, Trainer) else None
        if handler is not None and callback in handler.callbacks:
            return trainer
    return None


def running_evaluation(trainer: Trainer) -> Mapping[str, Any] | None:
    """Return the local names of the evaluation loop that is under way, if there is one."""
    for frame in frames():
        if frame.f_code.co_name == "evaluation_loop" and frame.f_locals.get("self") is trainer:
            return frame.f_locals
    return None


def _on_stack(name: str) -> list[Any]:
    return [frame.f_locals[name] for frame in frames() if name in frame.f_locals]
