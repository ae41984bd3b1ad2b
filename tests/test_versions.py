"""The lower bounds in pyproject.toml are what constraints-oldest.txt pins, and constraints.txt is within them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in found}


def requirements(extra: str | None) -> list[Requirement]:
    """Those of the package, or of an extra and the extras in it."""
    given = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = []
    for requirement in map(Requirement, given):
        if requirement.name == PROJECT["name"]:
            found += [inner for name in sorted(requirement.extras) for inner in requirements(name)]
        else:
            found.append(requirement)
    return found


NEEDED = [*requirements(None), *requirements("test")]


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda requirement: requirement.name)
def test_the_lower_bound_is_what_is_tested(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    assert pins("constraints-oldest.txt")[canonicalize_name(requirement.name)] == Version(bound.version)


@pytest.mark.parametrize("requirement", [*NEEDED, *requirements("dev")], ids=lambda requirement: requirement.name)
def test_the_versions_of_ci_are_within_the_bounds(requirement):
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier
