"""Both frameworks' callbacks take the same arguments, and their docstrings tell of each."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import matent_callbacks.lightning
import matent_callbacks.transformers
from matent_callbacks import CollapseDetector, EntropyMonitor, LoopMonitor, PlateauDetector, measure_alignment

SHARED = sorted(set(matent_callbacks.lightning.__all__) & set(matent_callbacks.transformers.__all__))


def told(documented: Any) -> dict[str, str]:
    """What a docstring says of each argument."""
    section = re.search(r"^Args:\n(.*?)^\w+:$", inspect.getdoc(documented) or "", re.DOTALL | re.MULTILINE)
    assert section
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1], re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


@pytest.mark.parametrize("name", SHARED)
def test_signature_and_arguments_are_the_same_in_both_frameworks(name):
    ours = [getattr(module, name) for module in (matent_callbacks.lightning, matent_callbacks.transformers)]
    signatures = [inspect.signature(callback) for callback in ours]
    assert signatures[0] == signatures[1]
    for callback in ours:
        assert list(told(callback)) == list(signatures[0].parameters)
    assert told(ours[0]) == told(ours[1])


def test_what_is_the_same_is_told_with_the_same_words():
    from matent_callbacks.transformers import AlignmentCallback, CollapseAlarm, MatrixEntropyCallback, PlateauStopping

    for callback, source in (
        (MatrixEntropyCallback, EntropyMonitor),
        (AlignmentCallback, measure_alignment),
        (PlateauStopping, PlateauDetector),
        (CollapseAlarm, CollapseDetector),
    ):
        arguments, others = told(callback), told(source)
        same = [name for name in others if arguments.get(name) == others[name]]
        assert len(same) >= 4
        assert set(others) - set(same) <= {"model", "metrics", "probe", "on_error", "process_group", "context_group"}


def test_callbacks_estimate_wide_layers_and_the_monitor_does_not():
    from matent_callbacks.lightning import MatrixEntropyCallback as OfLightning
    from matent_callbacks.transformers import MatrixEntropyCallback

    defaults = {EntropyMonitor: "exact", LoopMonitor: "auto", MatrixEntropyCallback: "auto", OfLightning: "auto"}
    for documented, default in defaults.items():
        assert inspect.signature(documented).parameters["solver"].default == default


def test_the_monitor_of_loops_tells_of_each_argument():
    assert list(told(LoopMonitor)) == list(inspect.signature(LoopMonitor).parameters)


@pytest.mark.parametrize("module", [matent_callbacks.lightning, matent_callbacks.transformers])
def test_callbacks_are_built_on_two_classes_of_ours_at_most(module):
    for name in module.__all__:
        bases = getattr(module, name).__mro__[1:]
        assert len([base for base in bases if base.__module__.startswith("matent_callbacks.")]) <= 2, name
