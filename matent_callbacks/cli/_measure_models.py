"""Runs ``matent measure``: loads each model, streams the text through it, writes and prints the results."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import typer
from torch import nn

from matent_callbacks.accumulate.catalogue import sources_of
from matent_callbacks.accumulate.layer_statistics import OF_VECTORS
from matent_callbacks.capture.layers import resolve_layers
from matent_callbacks.cli._adapters import ModelError
from matent_callbacks.cli._baseline import compare, kept
from matent_callbacks.cli._documents import Text, TextError
from matent_callbacks.cli._entries import GROUPS, interval, layer_samples
from matent_callbacks.cli._fingerprints import fingerprint, joined
from matent_callbacks.cli._interruption import Interruption
from matent_callbacks.cli._models import LayersError, Loaded, first_sentence, load, training_progress
from matent_callbacks.cli._progress import with_bar
from matent_callbacks.cli._ranks import OtherRankError, Ranks
from matent_callbacks.cli._request import check_paths, checked_device, checked_settings, models_of
from matent_callbacks.cli._results import Results, ResultsError
from matent_callbacks.cli._shown import about_sinks, draw, notes, print_tables, say
from matent_callbacks.cli._state import State
from matent_callbacks.cli._stream import stream
from matent_callbacks.cli.measure import Request
from matent_callbacks.untrained import untrained_like

_SAVE_EVERY = 10.0  # seconds; less often where saving itself takes long


def run(request: Request) -> int:
    """Measure and print; under ``torchrun`` the documents are distributed over the ranks, and the first one prints.

    Returns:
        0; 1 if a model could not be measured or the results could not be written; 2 if a model does not have the
        layers asked for; 130 if interrupted.
    """
    with Ranks() as ranks:
        return _run(request, ranks)


def _run(request: Request, ranks: Ranks) -> int:
    try:
        with ranks.together():
            check_paths(request, ranks)
            device = checked_device(request.device, ranks)
            text = Text(request.text, field=request.field)
            results = Results(checked_settings(request, text), request.out if ranks.is_first else None)
    except OtherRankError:
        return 2
    except (TextError, ResultsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    models = models_of(request)
    passes = len(models) * (2 if request.untrained else 1)
    if passes > 1 or results.has_read:
        text.keep()
    run = _Run(request, text, results, device, ranks)
    if text.note:
        run.say(text.note)
    code = 0
    with Interruption() as interruption:
        try:
            if said := results.forget_other_texts(text):
                run.say(said)
            for model in models:
                known, said = ranks.from_first(results.check(model, request.baseline))
                if said:
                    run.say(said)
                if known:
                    continue
                failed = run.measure(model, interruption)
                code = max(code, failed)
                if failed and model == request.baseline:
                    run.say("without its baseline nothing is compared, so no model is measured.")
                    break
        except KeyboardInterrupt:
            again = f": the same command goes on from {request.out}" if request.out and not run.unsaved else ""
            run.say(f"interrupted{again}.")
            code = 130
    shown = [entry for entry in results.models if entry["model"] in models]
    if shown:
        print_tables(shown)
        for note in about_sinks(shown):
            run.say(note)
        if request.plot is not None:
            code = max(code, draw(shown, results.settings["metrics"], request.plot))
    return code or int(run.unsaved)


class _Run:
    """One run of the command, on one of its ranks."""

    def __init__(self, request: Request, text: Text, results: Results, device: str, ranks: Ranks) -> None:
        self.unsaved = False
        self._request = request
        self._text = text
        self._results = results
        self._device = device
        self._ranks = ranks
        self._next_save = 0.0

    def say(self, message: str) -> None:
        """Print one sentence on stderr, on the first rank only."""
        if self._ranks.is_first:
            say(message)

    def measure(self, name: str, interruption: Interruption) -> int:
        """Measure one model. If that fails, print one sentence on stderr; returns the exit code."""
        try:
            self._measure(name, interruption)
        except OtherRankError:
            return 1
        except LayersError as error:
            self.say(str(error))
            return 2
        except (ModelError, TextError) as error:
            say(str(error))
            return 1
        except torch.OutOfMemoryError:
            say(f"{name} runs out of memory with --batch-tokens {self._request.batch_tokens}: give a smaller number.")
            return 1
        except Exception as error:
            say(f"{name} cannot be measured: {first_sentence(error)}")
            return 1
        return 0

    def _measure(self, name: str, interruption: Interruption) -> None:
        request, ranks = self._request, self._ranks
        with ranks.together():
            before = fingerprint(name, baseline=request.baseline) if ranks.is_first else {}
            loaded = load(
                name,
                dtype=request.dtype,
                device=self._device,
                device_map=request.device_map,
                baseline=request.baseline,
                trust_remote_code=request.trust_remote_code,
                allow_pickle=request.allow_pickle,
            )
        for note in loaded.notes:
            self.say(note)
        bound = min(request.max_length, loaded.max_length or request.max_length)
        if bound < request.max_length:
            self.say(f"{name} takes {bound:,} tokens at most: longer documents are cut there.")
        with ranks.together():
            if ranks.is_first:
                own = joined(before, fingerprint(name, baseline=request.baseline))
                if said := self._results.begin(name, own, self._text):
                    self.say(said)
        states = self._results.states(name)
        trained = self._state(states, "trained")
        self._pass(name, "trained", loaded.model, loaded, bound, states, interruption)
        for note in notes(trained):
            self.say(f"{name}: {note}")
        with ranks.together():
            if ranks.is_first and trained.sequences == 0:
                raise ModelError(f"{name} was given no document that can be measured.")
        if request.untrained:
            self._state(states, "untrained")
            if len(set(getattr(loaded.model, "hf_device_map", {}).values())) > 1:
                raise ModelError(f"{name} is spread over several devices, and --untrained needs a model on one.")
            with ranks.together():
                fresh = untrained_like(loaded.model, seed=request.seed)
            self._pass(name, "untrained", fresh, loaded, bound, states, interruption)
        if ranks.is_first:
            self._finish(name, loaded, trained, states.get("untrained"))

    def _finish(self, name: str, loaded: Loaded, trained: State, untrained: State | None) -> None:
        """Compute the quantities of a model, compare them with those of the baseline, and save them."""
        results = self._results
        samples = layer_samples(trained, untrained, results.settings["metrics"])
        entry = {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "hidden_size": _hidden_size(loaded.model),
            "num_sequences": trained.sequences,
            "num_tokens": trained.tokens,
            "skipped": trained.skipped,
            **training_progress(name),
            "left_out_sinks": {
                layer: {"tokens": round(number), "times_as_long": math.exp(logs / number)}
                for layer, (number, logs) in trained.sinks.items()
            },
            "layers": {
                layer: {name: interval(values) for name, values in quantities.items()}
                for layer, quantities in samples.items()
            },
        }
        checksum = trained.checksum_of_tokens
        if name == self._request.baseline:
            results.baseline = kept(entry, samples, checksum)
        elif results.baseline is not None:
            of_baseline = next(one for one in results.models if one["model"] == self._request.baseline)
            for note in compare(entry, samples, checksum, baseline=of_baseline, before=results.baseline):
                self.say(note)
        results.finish(entry, trained)
        self._save()

    def _state(self, states: dict[str, State], which: str) -> State:
        """Return the progress of a pass; only the first rank keeps the statistics so far."""
        own = states.setdefault(which, State())
        place = self._ranks.from_first(own.place())
        if not self._ranks.is_first:
            own = states[which] = place
        return own

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
            layers = resolve_layers(model, settings["layers"])
        except ValueError as error:
            raise LayersError(f"{name}: {error}") from error
        sources = sources_of(settings["metrics"]) - {"sequence"}
        steps = stream(
            model,
            loaded.tokenizer,
            self._text,
            state,
            layers=layers,
            sources=sources if which == "trained" else frozenset(),
            embedding=request.embedding,
            takes_vectors=bool(sources & OF_VECTORS),
            exclude_sinks=not request.include_sinks,
            max_length=bound,
            batch_tokens=request.batch_tokens,
            max_sequences=request.max_sequences,
            seed=request.seed,
            # Their intervals are needed for differences alone.
            groups=GROUPS if request.baseline is not None and which == "trained" else 1,
            hold=interruption.hold,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
        )
        title = name if which == "trained" else f"{name}, untrained"
        # A signal to one rank must not make it miss the collective calls of all ranks.
        with interruption.hold() if self._ranks.size > 1 else nullcontext():
            shown = with_bar(
                self._together(steps, name, states, state, interruption),
                title,
                state,
                size=self._text.size,
                maximum=request.max_sequences,
                ranks=self._ranks.size,
                shown=self._ranks.is_first,
            )
            for _ in shown:
                pass

    def _together(
        self, steps: Iterator[int], name: str, states: dict[str, State], state: State, interruption: Interruption
    ) -> Iterator[int]:
        """Run the steps such that all ranks stop together and save together."""
        while True:
            done: int | None = None
            interrupted, error = False, None
            try:
                done = next(steps, None)
            except KeyboardInterrupt:
                interrupted = True
            except Exception as raised:
                error = raised
            due = self._ranks.is_first and time.monotonic() >= self._next_save
            stopped, saving = self._ranks.agree(error, interrupted or interruption.pending, due)
            if stopped or saving or done is None:
                self._collect(state)
            if (stopped or saving) and self._ranks.is_first:
                self._save(name, states)
            if stopped:
                raise KeyboardInterrupt
            if done is None:
                return
            yield done

    def _collect(self, state: State) -> None:
        """Collect the statistics of all ranks on the first one; the others start again from none."""
        for other in self._ranks.to_first(state.on(torch.device("cpu"))):
            state.add(other)
        if not self._ranks.is_first:
            state.clear()

    def _save(self, name: str | None = None, states: dict[str, State] | None = None) -> None:
        start = time.monotonic()
        try:
            self._results.save(name, states)
        except OSError as error:
            if not self.unsaved:
                say(f"--out {self._request.out} cannot be written ({error.strerror}); measuring goes on.")
            self.unsaved = True
        else:
            self.unsaved = False
        end = time.monotonic()
        self._next_save = end + max(_SAVE_EVERY, 20 * (end - start))


def _hidden_size(model: Any) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
