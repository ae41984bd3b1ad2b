"""What `matent measure` does, model by model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from matent_callbacks.accumulate.catalogue import CATALOGUE, check_metrics
from matent_callbacks.capture.layers import resolve_layers
from matent_callbacks.cli._documents import Text, TextError
from matent_callbacks.cli._entries import layer_quantities, notes, table
from matent_callbacks.cli._interruption import Interruption
from matent_callbacks.cli._models import LayersError, Loaded, ModelError, first_sentence, load, training_progress
from matent_callbacks.cli._results import Results, ResultsError, Settings
from matent_callbacks.cli._stream import State, left, stream
from matent_callbacks.untrained import untrained_like

_SAVE_EVERY = 10.0  # seconds; less often where saving itself takes long


class Request(NamedTuple):
    """The arguments of the command line."""

    models: list[str]
    text: str
    field: str | None
    layers: list[str]
    metrics: list[str]
    max_length: int
    max_sequences: int | None
    batch_tokens: int
    untrained: bool
    seed: int
    dtype: str
    device: str | None
    out: Path | None
    trust_remote_code: bool
    allow_pickle: bool


def run(request: Request) -> int:
    """Measure and print.

    Returns:
        0; 1 if a model could not be measured or the results not be written; 2 if a model has not the layers asked
        for; 130 if interrupted.
    """
    try:
        device = _device(request.device)
        _check_paths(request)
        text = Text(request.text, field=request.field)
        results = Results(_settings(request, text), request.out)
    except (TextError, ResultsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    passes = len(dict.fromkeys(request.models)) * (2 if request.untrained else 1)
    if passes > 1:
        text.keep()
    run = _Run(request, text, results, device)
    code = 0
    with Interruption() as interruption:
        try:
            for model in dict.fromkeys(request.models):
                if results.finished(model):
                    _say(f"{model} is in {request.out} already.")
                else:
                    code = max(code, run.measure(model, interruption))
        except KeyboardInterrupt:
            again = f": the same command goes on from {request.out}" if request.out and not run.unsaved else ""
            _say(f"interrupted{again}.")
            code = 130
    shown = [entry for entry in results.models if entry["model"] in request.models]
    if shown:
        # Without a terminal there is no width to keep to.
        Console(width=None if sys.stdout.isatty() else 240).print(table(shown))
    return code or int(run.unsaved)


class _Run:
    """The command at work."""

    def __init__(self, request: Request, text: Text, results: Results, device: str) -> None:
        self.unsaved = False
        self._request = request
        self._text = text
        self._results = results
        self._device = device
        self._next_save = 0.0

    def measure(self, name: str, interruption: Interruption) -> int:
        """All passes of one model; where that cannot be, one sentence on stderr and the exit code."""
        try:
            self._measure(name, self._results.states(name), interruption)
        except LayersError as error:
            _say(str(error))
            return 2
        except (ModelError, TextError) as error:
            _say(str(error))
            return 1
        except torch.OutOfMemoryError:
            _say(f"{name} runs out of memory with --batch-tokens {self._request.batch_tokens}: give a smaller number.")
            return 1
        except Exception as error:
            _say(f"{name} cannot be measured: {first_sentence(error)}")
            return 1
        return 0

    def _measure(self, name: str, states: dict[str, State], interruption: Interruption) -> None:
        request = self._request
        loaded = load(
            name,
            dtype=request.dtype,
            device=self._device,
            trust_remote_code=request.trust_remote_code,
            allow_pickle=request.allow_pickle,
        )
        if loaded.note:
            _say(loaded.note)
        bound = min(request.max_length, loaded.max_length or request.max_length)
        if bound < request.max_length:
            _say(f"{name} takes {bound:,} tokens at most: longer documents are cut there.")
        entry = {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "hidden_size": _hidden_size(loaded.model),
        }
        trained = states.setdefault("trained", State())
        self._pass(name, "trained", loaded.model, loaded, bound, states, interruption)
        for note in notes(trained):
            _say(f"{name}: {note}")
        if trained.sequences == 0:
            raise ModelError(f"{name} was given no document that can be measured.")
        if request.untrained:
            states.setdefault("untrained", State())
            fresh = untrained_like(loaded.model, seed=request.seed)
            self._pass(name, "untrained", fresh, loaded, bound, states, interruption)
        self._results.finish(
            {
                **entry,
                "num_sequences": trained.sequences,
                "num_tokens": trained.tokens,
                "skipped": trained.skipped,
                **training_progress(name),
                "layers": layer_quantities(trained, states.get("untrained"), self._results.settings.metrics),
            }
        )
        self._save()

    def _pass(
        self,
        name: str,
        which: str,
        model: nn.Module,
        loaded: Loaded,
        bound: int,
        states: dict[str, State],
        interruption: Interruption,
    ) -> None:
        request, state, settings = self._request, states[which], self._results.settings
        if state.complete:
            return
        try:
            layers = resolve_layers(model, settings.layers)
        except ValueError as error:
            raise LayersError(f"{name}: {error}") from error
        sources = frozenset(CATALOGUE[metric] for metric in settings.metrics) - {"sequence"}
        steps = stream(
            model,
            loaded.tokenizer,
            self._text,
            state,
            layers=layers,
            sources=sources if which == "trained" else frozenset(),
            max_length=bound,
            batch_tokens=request.batch_tokens,
            max_sequences=request.max_sequences,
            seed=request.seed,
            hold=interruption.hold,
        )
        try:
            title = name if which == "trained" else f"{name}, untrained"
            for _ in _with_bar(steps, title, state, size=self._text.size, maximum=request.max_sequences):
                if time.monotonic() >= self._next_save:
                    self._save(name, states)
        except KeyboardInterrupt:
            self._save(name, states)
            raise

    def _save(self, name: str | None = None, states: dict[str, State] | None = None) -> None:
        start = time.monotonic()
        try:
            self._results.save(name, states)
        except OSError as error:
            if not self.unsaved:
                _say(f"--out {self._request.out} cannot be written ({error.strerror}); measuring goes on.")
            self.unsaved = True
        else:
            self.unsaved = False
        end = time.monotonic()
        self._next_save = end + max(_SAVE_EVERY, 20 * (end - start))


def _settings(request: Request, text: Text) -> Settings:
    metrics = _pieces(request.metrics)
    layers = [int(piece) if piece.lstrip("-").isdecimal() else piece for piece in _pieces(request.layers)]
    if not layers:
        raise ValueError("--layers must name at least one layer.")
    return Settings(
        text=request.text,
        text_bytes=text.size,
        field=request.field,
        layers=layers,
        metrics=list(check_metrics(metrics)) if metrics else [],
        max_length=request.max_length,
        max_sequences=request.max_sequences,
        batch_tokens=request.batch_tokens,
        untrained=request.untrained,
        seed=request.seed,
        dtype=request.dtype,
    )


def _pieces(values: Iterable[str]) -> list[str]:
    return [piece.strip() for value in values for piece in value.split(",") if piece.strip()]


def _check_paths(request: Request) -> None:
    for model in request.models:
        is_path = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
        if is_path and not Path(model).is_dir():
            raise ValueError(f"MODEL must be a folder or a name on the hub, and {model} is no folder.")
    if request.out is not None and not request.out.absolute().parent.is_dir():
        raise ValueError(f"--out is to be in {request.out.absolute().parent}, and there is no such folder.")
    if request.out is not None and request.out.is_dir():
        raise ValueError(f"--out must be a file, and {request.out} is a folder.")


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device must be one that is here, got {name!r} ({first_sentence(error)}).") from error
    return name


def _hidden_size(model: Any) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


@contextmanager
def _bar(title: str) -> Iterator[tuple[Progress, Any]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress, progress.add_task(title, total=None, rate="")


def _with_bar(
    steps: Iterator[int], title: str, state: State, *, size: int | None, maximum: int | None
) -> Iterator[None]:
    """The steps, and a bar on stderr with rate and time left while they are taken; none where that is no terminal."""
    begin, before = time.monotonic(), state.sequences
    with _bar(title) as (progress, task):
        for done in steps:
            rate = (state.sequences - before) / max(time.monotonic() - begin, 1e-9)
            shares = [done / size] if size else []
            if maximum is not None:
                shares.append(1 - (left(maximum, state.sequences) or 0) / maximum)
            total, completed = (1.0, max(shares)) if shares else (None, 0.0)
            progress.update(task, total=total, completed=completed, rate=f"{rate:,.1f} sequences/s")
            yield


def _say(message: str) -> None:
    print(f"matent: {message}", file=sys.stderr, flush=True)
