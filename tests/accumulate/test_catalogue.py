"""The table of metrics, and what is told of it elsewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from matent_callbacks import EntropyMonitor
from matent_callbacks.accumulate.averages import Average
from matent_callbacks.accumulate.catalogue import CATALOGUE, METRICS, quantity
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.functional.entropy import _SUMMARY

QUANTITIES = Path(__file__, "../../../docs/quantities.md").resolve().read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_row_names_statistics_and_a_formula_that_are_there(name):
    row = CATALOGUE[name]
    assert {row.source, *row.further} <= STATISTICS.keys()
    is_mean = issubclass(STATISTICS[row.source], Average)
    assert (row.solver == "none") == is_mean
    assert is_mean or name in ("spectrum", "top_dimension_share") or quantity(name) in _SUMMARY


def test_the_monitor_and_the_page_of_quantities_give_the_units_of_the_table():
    told = re.findall(r"^``(\w+)`` +(\S+)  ", inspect.getdoc(EntropyMonitor) or "", re.MULTILINE)
    assert dict(told) == {name: row.unit or "-" for name, row in CATALOGUE.items()}
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w ]+) \|[^|]+\|$", QUANTITIES, re.MULTILINE)
    assert {name: unit for name, unit in rows if name in METRICS} == {
        name: row.unit or "none" for name, row in METRICS.items()
    }
