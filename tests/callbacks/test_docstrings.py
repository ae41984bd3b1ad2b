"""Both frameworks' callbacks take the same arguments, and their docstrings tell of each."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import matent_callbacks.lightning
import matent_callbacks.transformers
from matent_callbacks import EntropyMonitor, PlateauDetector, measure_alignment
from matent_callbacks.callbacks.docstrings import completed, with_arguments_of

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
    from matent_callbacks.transformers import AlignmentCallback, MatrixEntropyCallback, PlateauStopping

    for callback, source in (
        (MatrixEntropyCallback, EntropyMonitor),
        (AlignmentCallback, measure_alignment),
        (PlateauStopping, PlateauDetector),
    ):
        arguments, others = told(callback), told(source)
        same = [name for name in others if arguments.get(name) == others[name]]
        assert len(same) >= 5
        assert set(others) - set(same) <= {"model", "metrics", "probe", "on_error", "process_group", "context_group"}


def test_own_words_and_errors_go_first():
    arguments = "Args:\n    a: Of the source,\n        two lines.\n    b: Left out."
    source = f"Does it.\n\n{arguments}\n\nRaises:\n    ValueError: Never.\n"
    own = "Does more.\n\nArgs:\n    c: Its own.\n\nExample:\n    >>> 1\n    1\n"
    expected = (
        "Does more.\n\nArgs:\n    a: Of the source,\n        two lines.\n    c: Its own.\n\n"
        "Raises:\n    ValueError: Never.\n\nExample:\n    >>> 1\n    1\n"
    )
    assert completed(own, source, ["a", "c"]) == expected
    assert "Always" in completed(f"{own}\nRaises:\n    KeyError: Always.\n", source, ["a", "c"])


def test_without_docstrings_nothing_is_made_up():
    def silent(a: int) -> None: ...

    assert with_arguments_of(measure_alignment)(silent).__doc__ is None
